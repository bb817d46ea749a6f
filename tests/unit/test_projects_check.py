"""`check_files` and the checks that it calls: a deploy reports every error of a project, with its
line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex.errors import InvalidProject, InvalidSpec
from cortex.projects.check import check_files
from cortex.projects.dotenv import check_variables, read_variables
from cortex.projects.requirements import MIN_PYTHON, is_local, read_requirements, satisfies
from cortex.spec.api import Dependencies
from cortex.spec.cortex_yaml import read_apis

YAML = "- name: a\n  kind: TaskAPI\n  definition:\n    path: {path}\n"
TASK = "def task(config):\n    return 1\n"


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def check(project: Path, text: str) -> list[str]:
    """The mistakes of a project."""
    try:
        check_files(read_apis(text, "cortex.yaml"), project, "cortex.yaml", text)
    except InvalidSpec as error:
        return error.message.split("\n")
    return []


def warnings(project: Path, definition: str = "path: a.py") -> list[str]:
    text = f"- {{name: a, kind: TaskAPI, definition: {{{definition}}}}}\n"
    (found,) = check_files(read_apis(text, "cortex.yaml"), project, "cortex.yaml", text)
    return found


@pytest.mark.parametrize(
    "source",
    [
        TASK,
        "class Task:\n    pass\n",
        "from other import *\n",
        "from other import Thing as Task\n",
        "import x\nTask = x.Task\n",
        "task: object = print\n",
        "try:\n    import a\nexcept ImportError:\n    def task(c): ...\n",
        "if True:\n    pass\nelse:\n    class Task: ...\n",
        "with x:\n    Task, other = 1, 2\n",
        "if 1: pass\n" + "elif 1: pass\n" * 900 + "else:\n    task = 1\n",
        "match 1:\n    case _:\n        task = 1\n",
        "# -*- coding: latin-1 -*-\n# \xe9\n" + TASK,
        "'\\d'\n" + TASK,
        "def task(c):\n    def rows():\n        yield 1\n    return list(rows())\n",
        "def task(c):\n    async def run(): ...\n    return asyncio.run(run())\n",
        "def task(c):\n    return sum((lambda: (yield))() for _ in c)\n",
        "@asyncio_main\nasync def task(c): ...\n",
        "@contextmanager\ndef task(c):\n    yield\n",
        "def task(c):\n    yield 1\n\ntask = listed(task)\n",
        "def task(c):\n    yield 1\n\nfor name in ['task']:\n    globals()[name] = list\n",
        "def task(c):\n    yield 1\n\ndef use():\n    global task\n    task = list\n\nuse()\n",
        "if x:\n    async def task(c): ...\nelse:\n    def task(c): ...\n",
        "from other import *\nasync def task(c): ...\n",
        "def task(c):\n    yield 1\n\nclass Task:\n    def __call__(self, c): ...\n",
        "class Task(Base):\n    async def __call__(self, c): ...\n",
        "class Task(metaclass=Meta):\n    async def __call__(self, c): ...\n",
        "@wrapped\nclass Task:\n    async def __call__(self, c): ...\n",
        "class Task:\n    @wrapped\n    async def __call__(self, c): ...\n",
        "class Task:\n    async def run(self, c): ...\n    __call__ = synced(run)\n",
        "class Task:\n    async def __call__(self, c): ...\nTask.__call__ = synced(Task)\n",
        "async def task(c): ...\nclass Task(Base): ...\n",
        "\ufeff" + TASK,
    ],
)
def test_a_file_that_may_define_a_task_is_accepted(source: str, tmp_path: Path) -> None:
    encoding = "latin-1" if "latin-1" in source else "utf-8"
    write(tmp_path, {"a.py": source.encode(encoding)})
    assert check(tmp_path, YAML.format(path="a.py")) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", 'cortex.yaml:4: definition.path: "a.py" defines neither a class Task nor'),
        ("def f():\n    task = 1\n", "defines neither"),
        ("class Tasks: ...\n", 'did you mean "Tasks"?'),
        ("async def task(c): ...\n", 'the task in "a.py" is async; define def task(config)'),
        (
            "def task(c):\n    print(1)\n    for i in c:\n        yield i\n",
            'the task in "a.py" is a generator (line 4 has yield), and calling a generator',
        ),
        ("def task(c):\n    x = yield from c\n", "is a generator (line 2 has yield)"),
        ("async def task(c):\n    yield 1\n", "is a generator (line 2 has yield)"),
        ("def task(c):\n    with a: b = [(yield)]\n", "is a generator (line 2 has yield)"),
        (
            "class Task:\n    x = 1\n    def __call__(self, c):\n        yield 1\n",
            'the __call__ of the class Task in "a.py" is a generator (line 4 has yield)',
        ),
        (
            "class Task:\n    async def __call__(self, c): ...\n",
            'the __call__ of the class Task in "a.py" is async; define def __call__(self, config)',
        ),
        (
            "task = 1\nclass Task:\n    async def __call__(self, c): ...\n",
            "__call__ of the class T",
        ),
        ("x = 1\ndef task(:\n", 'a.py:2: invalid syntax: "def task(:"'),
        ("x = '\0'\n", "a.py:1: source code string cannot contain null bytes"),
    ],
)
def test_a_file_without_a_usable_task_is_refused(source: str, message: str, tmp_path: Path) -> None:
    (line,) = check(write(tmp_path, {"a.py": source}), YAML.format(path="a.py"))
    assert message in line


def test_the_syntax_of_another_python_is_not_checked(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "def task(:\n", "conda-packages.txt": "python=3.99\n"})
    assert check(tmp_path, YAML.format(path="a.py")) == []


def test_a_file_too_deep_or_too_long_to_parse_is_not_checked(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "x = " + "-" * 100_000 + "1\n", "b.py": "#" * (5 << 20)})
    assert check(tmp_path, YAML.format(path="a.py")) == []
    assert check(tmp_path, YAML.format(path="b.py")) == []


def test_every_mistake_of_a_project_is_reported_at_once(tmp_path: Path) -> None:
    write(
        tmp_path / "p",
        {
            "src/train.py": TASK,
            "notes.txt": "x",
            "folder.py/x": "",
            ".env": "A=1\n2B=3\n",
            "requirements.txt": "-r ../other.txt\n",
            "conda-packages.txt": "numpy\n",
            "pyproject.toml": "x = [\n",
        },
    )
    write(tmp_path, {"outside/x.py": TASK})
    (tmp_path / "p/link.py").symlink_to("../outside/x.py")
    entry = "- name: {}\n  kind: TaskAPI\n  definition:\n    path: {}\n    python_path: {}\n"
    wanted = [
        ("train.py", "scr"),
        ("src/trian.py", "notes.txt"),
        ("notes.txt", "."),
        ("folder.py", "src"),
        ("link.py", "src"),
    ]
    text = "".join(entry.format(f"a{i}", *one) for i, one in enumerate(wanted))
    assert check(tmp_path / "p", text) == [
        'cortex.yaml:4: definition.path: "train.py" is not in the project; allowed: a Python file; did you mean "src/train.py"?',
        'cortex.yaml:5: definition.python_path: "scr" is not in the project; allowed: a folder; did you mean "src"?',
        'cortex.yaml:9: definition.path: "src/trian.py" is not in the project; allowed: a Python file; did you mean "src/train.py"?',
        'cortex.yaml:10: definition.python_path: "notes.txt" is a file; allowed: a folder',
        'cortex.yaml:14: definition.path: found "notes.txt"; allowed: a file whose name ends in .py (or use command)',
        'cortex.yaml:19: definition.path: "folder.py" is a folder; allowed: a Python file',
        'cortex.yaml:24: definition.path: "link.py" is not in the project; allowed: a Python file; did you mean "link.py"?',
        "conda-packages.txt:1: numpy: conda packages are not installed; if PyPI has numpy, put it into requirements.txt",
        "requirements.txt:1: -r ../other.txt: leaves the project; allowed: a file inside it",
        check(tmp_path / "p", text)[9],
        '.env:2: found the name "2B"; allowed: letters, digits and _, the first not a digit',
    ]
    assert check(tmp_path / "p", text)[9].startswith("pyproject.toml:")


def test_a_version_with_thousands_of_digits_is_no_version(tmp_path: Path) -> None:
    digits = "1" * 5000
    write(tmp_path, {"a.py": TASK, "conda-packages.txt": f"python={digits}\n"})
    (message,) = check(tmp_path, "- {name: a, kind: TaskAPI, definition: {path: a.py}}")
    assert message.startswith(f"conda-packages.txt:1: python={digits[:50]}")
    write(tmp_path, {"conda-packages.txt": "", "pyproject.toml": pyproject(f">={digits}")})
    assert read_requirements(tmp_path).python_to_find == f">={digits}"  # uv reports the error


def pyproject(requires: str) -> str:
    return f'[project]\nname = "x"\nversion = "1"\nrequires-python = "{requires}"\n'


def requirement_mistakes(project: Path) -> list[str]:
    return read_requirements(project).errors


def test_a_command_needs_no_file(tmp_path: Path) -> None:
    assert check(tmp_path, "- {name: a, kind: TaskAPI, definition: {command: [ls]}}") == []


@pytest.mark.parametrize("name", ["my.task.py", "train-v1.2.py", "pkg/1.py", "json.py"])
def test_a_file_of_any_name_that_ends_in_py_is_accepted(name: str, tmp_path: Path) -> None:
    write(tmp_path, {name: TASK})
    assert check(tmp_path, YAML.format(path=name)) == []


POETRY = "[tool.poetry.dependencies]\npython = '^3.10'\nrequests = '^2.31'\n"
PROJECT = "[project]\nname = 'x'\nversion = '1'\ndependencies = ['six']\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"pyproject.toml": POETRY},
            "[tool.poetry.dependencies] of pyproject.toml is not read; list the packages that jobs need in requirements.txt or in the dependencies of [project], for example by `poetry export -o requirements.txt`",
        ),
        ({"pyproject.toml": "[tool.pixi.dependencies]\nx = '*'\n"}, "[tool.pixi.dependencies] of"),
        (
            {"pyproject.toml": "[tool.flit.metadata]\nrequires = ['x']\n"},
            "[tool.flit.metadata.requires] of pyproject.toml is not read; list the packages that jobs",
        ),
        (
            {"Pipfile": "[packages]\n"},
            "Pipfile is not read; list the packages that jobs need in requirements.t",
        ),
        (
            {"environment.yml": "dependencies: [numpy]\n"},
            "environment.yml is not read; list the packages that jo",
        ),
        (
            {"requirements.in": "six\n"},
            "requirements.in is not read; list the packages that jobs need in requ",
        ),
        (
            {"setup.py": "setup(install_requires=['x'])\n"},
            "install_requires of setup.py is not read",
        ),
        ({"setup.cfg": "[options]\ninstall_requires =\n  x\n"}, "install_requires of setup.cfg is"),
        (
            {"requirements/prod.txt": "six\n"},
            "requirements/prod.txt is not read; to install it, set definition.dependencies: {pip: requirements/prod.txt}",
        ),
        (
            {"requirements.in": "six\n", "conda-packages.txt": "pip=24\n"},
            "requirements.in is not read; list the packages that jobs need in requirements.txt, for example by",
        ),
        (
            {"latest.requirements.txt": "six\n"},
            "latest.requirements.txt is not read; to install it, set definition.dependencies: {pip: latest.r",
        ),
        (
            {"app/requirements.txt": "six\n"},
            "app/requirements.txt is not read; to install it, set definition",
        ),
        (
            {"requirements-gpu.txt": "six\n"},
            "requirements-gpu.txt is not read; to install it, set definition",
        ),
        (
            {"dependencies.sh": "apt-get install -y tree\n", "requirements.txt": "six\n"},
            "dependencies.sh is not run, because environments contain Python packages only; install on the",
        ),
        (
            {"uv.lock": "version = 1\n", "pyproject.toml": PROJECT},
            "uv.lock is not read: the first build of the environment resolves versions again; to keep these versions, use `uv export -o requirements.txt`",
        ),
        (
            {"a.py": '# /// script\n# dependencies = [\n#   "six",\n# ]\n# ///\n' + TASK},
            "the dependencies in the comment `# /// script` of a.py are not read; list the packages that jobs need",
        ),
    ],
)
def test_a_file_of_dependencies_that_is_not_read_is_named(
    files: dict[str, str | bytes], message: str, tmp_path: Path
) -> None:
    (found,) = warnings(write(tmp_path, {"a.py": TASK, **files}))
    assert found.startswith(message)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"requirements.txt": "six\n", "pyproject.toml": POETRY, "poetry.lock": "", "Pipfile": ""},
        {
            "pyproject.toml": PROJECT + POETRY,
            "setup.py": "setup()\n",
            "requirements-dev.txt": "x\n",
        },
        {"pyproject.toml": "[tool.poetry.dependencies]\npython = '^3.10'\n"},
        {"setup.cfg": "[metadata]\nname = x\n", "setup.py": "setup()\n", "dependencies.sh": "\n"},
        {"setup.cfg": "nonsense", "docs/requirements.txt": "sphinx\n", "notes.txt": "x"},
        {"requirements-dev.txt": "x\n", "tests/requirements.txt": "x\n"},
        {"pyproject.toml": "[tool]\npoetry = 1\n[tool.flit]\nmetadata = [[1]]\n"},
        {"pyproject.toml": "[tool.poetry]\ndependencies = []\n"},
        {"a.py": "# /// script\n# dependencies = []\n# ///\n" + TASK},
    ],
)
def test_no_warning_names_a_file_that_is_read_or_not_meant_for_jobs(
    files: dict[str, str | bytes], tmp_path: Path
) -> None:
    assert warnings(write(tmp_path, {"a.py": TASK, **files})) == []


def test_odd_files_are_read_quickly(tmp_path: Path) -> None:
    script = "# /// script\n" * 70_000
    odd = "requirements" + "_" * 200 + "x.text"
    write(tmp_path, {"a.py": script + TASK, odd: "", "pyproject.toml": pyproject(">=3.99," * 9999)})
    assert warnings(tmp_path) == []
    write(tmp_path, {"pyproject.toml": "[tool.pixi]\ndependencies = [[1], {}]\n"})
    (message,) = warnings(tmp_path)
    assert message.startswith("[tool.pixi.dependencies] of pyproject.toml is not read")


def test_a_script_that_an_api_names_for_its_packages_causes_a_warning(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": TASK, "gpu.sh": "apt-get\n", "dependencies.sh": "apt-get\n"})
    (found,) = warnings(tmp_path, "path: a.py, dependencies: {shell: gpu.sh}")
    assert found.startswith("gpu.sh is not run, ")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "[./windows.sh]",
            '"./windows.sh" would not run: its lines end as on Windows, and the first',
        ),
        (
            "[run.sh]",
            '"run.sh" would not run: it is not on PATH, but in the project: write ./run.sh',
        ),
        (
            "[./data.txt]",
            '"./data.txt" would not run: it is not executable; chmod +x it before the',
        ),
        ("[./no.sh]", '"./no.sh" would not run: there is no such file'),
        ("[python a.py]", '"python a.py" would not run: no program has that name; write each word'),
        (
            "[sh, windows.sh]",
            '"windows.sh" has Windows line endings, which a shell reads as part',
        ),
        ("[/bin/bash, -eu, ./windows.sh]", '"./windows.sh" has Windows line endings, which a'),
    ],
)
def test_a_program_of_the_project_that_would_not_run_is_a_warning(
    command: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path, {"run.sh": "#!/bin/sh\n", "windows.sh": "#!/bin/bash\r\n", "data.txt": "x"})
    for script in ("run.sh", "windows.sh"):
        (tmp_path / script).chmod(0o755)
    (found,) = warnings(tmp_path, f"command: {command}")
    assert found.startswith(f"definition.command: {message}")


@pytest.mark.parametrize(
    "command",
    [
        "[./run.sh]",
        "[sh, run.sh]",
        "[sh, -c, windows.sh]",
        "[sh]",
        "[bash, ../windows.sh]",
        "[../no-such]",
        "[/no/such]",
        "[no-such-program]",
        f"[./{'x' * 300}]",
    ],
)
def test_a_program_that_cannot_be_checked_causes_no_warning(command: str, tmp_path: Path) -> None:
    write(tmp_path, {"windows.sh": "x\r\n", "p/run.sh": "#!/bin/sh\n"})
    (tmp_path / "p/run.sh").chmod(0o755)
    assert warnings(tmp_path / "p", f"command: {command}") == []


def test_a_variable_of_python_in_env_is_refused_where_a_file_is_run(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": TASK, ".env": "A=1\nPYTHONHOME=/x\nPYTHONUTF8=2\nPYTHONPATH=libs\n"})
    first, second = check(tmp_path, YAML.format(path="a.py"))
    assert first.startswith(
        ".env:2: PYTHONHOME: allowed only with a command, not with a path: it changes the pat"
    )
    assert second == '.env:3: PYTHONUTF8: found "2"; allowed: 0 or 1'
    assert check(tmp_path, "- {name: a, kind: TaskAPI, definition: {command: [ls]}}") == []


def test_variables_are_read_as_they_are_written(tmp_path: Path) -> None:
    text = "\ufeffA=1\n# c\n\nexport B='x y' # c\nC=\"l1\\nl2\"\nD=$A ${A}\nE=\nA=2\n"
    write(tmp_path, {".env": text})
    assert read_variables(tmp_path) == {
        "A": "2",
        "B": "x y",
        "C": "l1\nl2",
        "D": "$A ${A}",
        "E": "",
    }
    assert check_variables(tmp_path) == []
    assert read_variables(tmp_path / "nowhere") == {}


def test_mistakes_in_variables_have_lines_and_show_no_values(tmp_path: Path) -> None:
    text = "A=1\n\nNOVALUE\nKEY='hush\nCORTEX_X=1\nB=\0\na-b=1\n= 5\n"
    found = check_variables(write(tmp_path, {".env": text}))
    joined = "\n".join(found)
    assert ".env:3: is not NAME=value; put a value of several lines in quotes" in found
    assert ".env:4: cannot be read; allowed: NAME=value, one per line" in found
    assert ".env:5: CORTEX_X: names that start with CORTEX_ are reserved; choose another" in found
    assert ".env:6: B: the value contains a NUL character; remove it" in found
    assert '.env:7: found the name "a-b"; allowed: letters' in joined
    assert "hush" not in joined
    write(tmp_path, {".env": b"A=\xff\n"})
    assert check_variables(tmp_path) == [".env: not UTF-8 text; save it as UTF-8"]
    with pytest.raises(InvalidProject):
        read_variables(tmp_path)


@pytest.mark.parametrize(
    ("text", "python", "pip"),
    [
        ("python=3.11\n", "3.11", None),
        ("# c\n\npython==3.11.*  # c\npip=24\n", "3.11", "24"),
        ("python=3.11.7\r\npip=23.2.*\r\n", "3.11.7", "23.2"),
        ("pip\nPython = 3.12", "3.12", ""),
        ("conda-forge::python=3.11\n", "3.11", None),
        ("conda-forge/linux-64::python==3.11.4=h7579374_1\npip=24=x", "3.11.4", "24"),
        ("python 3.11\npip 24.* pyhd8ed1ab_0\n", "3.11", "24"),
        ("python=3.11.*\npython=3.11", "3.11", None),
        ("python=3.11.* *_cpython", "3.11", None),
        ("python>=3.10\npip>=23,<25", ">=3.10", ">=23,<25"),
        ("python >=3.10, <3.12", ">=3.10,<3.12", None),
        ("python>=3.10,!=3.12.*,=3", ">=3.10,!=3.12.*,==3.*", None),
        ("python~=3.10", "~=3.10", None),
        ("python[version='>=3.10,<4']", ">=3.10,<4", None),
        ("python=*\n", "", None),
        ("", None, None),
    ],
)
def test_python_and_pip_of_conda_packages_are_read(
    text: str, python: str | None, pip: str | None, tmp_path: Path
) -> None:
    wanted = read_requirements(write(tmp_path, {"conda-packages.txt": text}))
    assert (wanted.python, wanted.pip, wanted.errors) == (python, pip, [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "numpy",
            "conda packages are not installed; if PyPI has numpy, put it into requirements.txt",
        ),
        (
            "conda-forge::rdkit=2024",
            "conda packages are not installed; if PyPI has rdkit, put it into",
        ),
        (
            "pytorch::pytorch=2.1",
            "conda packages are not installed; put torch into requirements.txt",
        ),
        (
            "pytorch-cuda=12.1",
            "conda packages are not installed, and PyPI has no package of this name; remove the line: wh",
        ),
        (
            "cudatoolkit=11.8",
            "conda packages are not installed, and PyPI has no package of this name; remove the line: wheel",
        ),
        (
            "_libgcc_mutex=0.1=main",
            "conda packages are not installed, and PyPI has no package of this name",
        ),
        (
            "libgdal",
            "conda packages are not installed, and PyPI has no package of this name; remove the line if",
        ),
        ("python=three", "the version of python cannot be read; allowed: python=3.11, or a range"),
        (
            "python=3.10|3.11",
            "the version of python cannot be read; allowed: python=3.11, or a ra",
        ),
        (
            "python=>3.11",
            "the version of python cannot be read; allowed: python=3.11, or a range s",
        ),
        (
            "pip>=x",
            "the version of pip cannot be read; allowed: pip=24, or a range such as pip>=24",
        ),
        ("- numpy", "cannot be read; allowed: a line such as python=3.11"),
        ("@EXPLICIT", "cannot be read; allowed: a line such as python=3.11"),
    ],
)
def test_any_other_line_of_conda_packages_is_a_mistake(
    line: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path, {"conda-packages.txt": f"python=3.11\n\n{line}\n"})
    (found,) = requirement_mistakes(tmp_path)
    assert found.startswith(f"conda-packages.txt:3: {line}: {message}")
    assert "no package of this name" not in found or "requirements.txt" not in found


def test_only_the_first_mistakes_of_a_whole_export_are_reported(tmp_path: Path) -> None:
    exported = "".join(f"package-{number}=1.0=0\n" for number in range(200))
    found = requirement_mistakes(write(tmp_path, {"conda-packages.txt": exported}))
    assert len(found) == 11
    assert found[-1] == "conda-packages.txt: 190 more lines request neither python nor pip"


@pytest.mark.parametrize(
    ("files", "file", "found"),
    [
        ({"conda-packages.txt": "python=3.8\n"}, "conda-packages.txt", "3.8"),
        ({"conda-packages.txt": "conda-forge::python=3.6.9\n"}, "conda-packages.txt", "3.6.9"),
        ({"conda-packages.txt": "python=2\n"}, "conda-packages.txt", "2"),
        ({"conda-packages.txt": "python>=3.6,<3.9\n"}, "conda-packages.txt", ">=3.6,<3.9"),
        ({"pyproject.toml": "[project]\nrequires-python = '~=3.8.0'"}, "pyproject.toml", "~=3.8.0"),
        ({"pyproject.toml": "[project]\nrequires-python = '<3.9'"}, "pyproject.toml", "<3.9"),
    ],
)
def test_a_python_that_the_worker_does_not_run_on_is_refused(
    files: dict[str, str | bytes], file: str, found: str, tmp_path: Path
) -> None:
    (message,) = requirement_mistakes(write(tmp_path, files))
    assert message.startswith(
        f"{file}: found Python {found}; allowed: {MIN_PYTHON} or later, such as "
    )


@pytest.mark.parametrize(
    "requested", ["python=3", "python=3.9", "python<3.11", "python=4", "python"]
)
def test_uv_chooses_among_other_pythons_but_none_that_is_too_old(
    requested: str, tmp_path: Path
) -> None:
    wanted = read_requirements(write(tmp_path, {"conda-packages.txt": requested}))
    assert wanted.errors == []
    expected = {"python=3.9": "3.9", "python<3.11": f"<3.11,>={MIN_PYTHON}", "python=4": "4"}
    assert wanted.python_for_uv == expected.get(requested)


def test_the_files_that_an_api_names_are_read_instead(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "requirements.txt": "six\n",
            "conda-packages.txt": "numpy\n",
            "gpu/reqs.txt": "-r base.txt\n",
            "gpu/base.txt": "idna\n",
            "gpu/conda.txt": "python=3.12\n",
        },
    )
    named = Dependencies(pip="./gpu/reqs.txt", conda="gpu/conda.txt")
    wanted = read_requirements(tmp_path, named)
    assert (wanted.arguments, wanted.python, wanted.errors) == (
        ["-r", "gpu/reqs.txt"],
        "3.12",
        [],
    )
    assert wanted.lines == [("gpu/reqs.txt", "-r base.txt"), ("gpu/base.txt", "idna")]
    assert read_requirements(tmp_path).arguments == ["-r", "requirements.txt"]


def test_an_environment_yml_cannot_be_named(tmp_path: Path) -> None:
    write(tmp_path, {"environment.yml": "name: x\ndependencies: [python=3.11]\n"})
    wanted = read_requirements(tmp_path, Dependencies(conda="environment.yml"))
    (message,) = wanted.errors
    assert message.startswith(
        "environment.yml: a YAML file of conda is not read; write its python and"
    )


def test_files_that_an_api_names_must_exist(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": TASK, "gpu/requirements.txt": "six\n", "r.txt": "-r no.txt\n"})
    text = (
        "- name: a\n  kind: TaskAPI\n  definition:\n    path: a.py\n    dependencies:\n"
        "      pip: requirements.txt\n      conda: gpu\n      shell: install.sh\n"
        "- {name: b, kind: TaskAPI, definition: {path: a.py, dependencies: {pip: r.txt}}}\n"
    )
    assert check(tmp_path, text) == [
        'cortex.yaml:6: definition.dependencies.pip: "requirements.txt" is not in the project; allowed: a file; did you mean "gpu/requirements.txt"?',
        'cortex.yaml:7: definition.dependencies.conda: "gpu" is a folder; allowed: a file',
        'cortex.yaml:8: definition.dependencies.shell: "install.sh" is not in the project; allowed: a file',
        "r.txt:1: -r no.txt: the project has no file no.txt",
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"conda-packages.txt": "python=3.11\npython=3.12\n"},
            "conda-packages.txt:2: python=3.12: python is given twice, with different versions",
        ),
        ({"conda-packages.txt": b"\xff"}, "conda-packages.txt: not UTF-8 text"),
        ({"requirements.txt": "six\n".encode("utf-16")}, "requirements.txt: not UTF-8 text"),
        (
            {"requirements.txt": "six\n-r a.txt", "a.txt": "-c no.txt"},
            "a.txt:1: -c no.txt: the project has no file no.txt",
        ),
        (
            {"requirements.txt": "a \\\n  b\n--requirement=/etc/x"},
            "requirements.txt:3: --requirement=/etc/x: leaves",
        ),
        ({"pyproject.toml": "[project]\nname = \n"}, "pyproject.toml:2: is not valid TOML"),
        ({"pyproject.toml": b"\xff"}, "pyproject.toml: not UTF-8 text"),
        ({"pyproject.toml": "project = 1"}, "pyproject.toml: project: found 1; allowed: a table"),
        (
            {"pyproject.toml": "[project]\ndependencies = 'six'"},
            "pyproject.toml: project.dependencies: found 'six'; allowed",
        ),
        (
            {"pyproject.toml": "[project]\nrequires-python = 3"},
            "pyproject.toml: project.requires-python: found 3; allowed",
        ),
        ({"requirements.txt": "-r " + "n" * 300}, "requirements.txt:1: -r nnn"),
        ({"requirements.txt": "-r a\0b"}, "requirements.txt:1: -r a\0b: leaves"),
        ({"pyproject.toml": "a = " + "[" * 5000}, "pyproject.toml: is not valid TOML: nested"),
        (
            {"pyproject.toml": "a = " + "9" * 5000},
            "pyproject.toml: is not valid TOML: Exceeds",
        ),
    ],
    ids=range(14),
)
def test_a_mistake_in_requirements_has_its_file_and_line(
    files: dict[str, str | bytes], message: str, tmp_path: Path
) -> None:
    (found,) = requirement_mistakes(write(tmp_path, files))
    assert found.startswith(message)


def test_an_include_that_is_a_link_out_of_the_project_is_a_mistake(tmp_path: Path) -> None:
    write(tmp_path, {"p/requirements.txt": "-r x.txt", "x.txt": "six"})
    (tmp_path / "p/x.txt").symlink_to("../x.txt")
    assert "leaves the project" in requirement_mistakes(tmp_path / "p")[0]


@pytest.mark.parametrize(
    "line",
    [
        "-e .",
        "--editable=./x",
        ".",
        ".[dev]",
        "./x",
        "lib/x",
        "x.whl",
        "a @ file:x",
        "a @ ./x",
        "-f wheels",
    ],
)
def test_a_requirement_of_a_local_folder_or_file_is_local(line: str) -> None:
    assert is_local(line)


@pytest.mark.parametrize(
    "line",
    [
        "six",
        "six==1; python_version<'4'",
        "a[b]>=1",
        "--index-url https://x/y",
        "a @ https://x/a.whl",
        "--no-binary :all:",
    ],
)
def test_a_requirement_from_an_index_or_url_is_not_local(line: str) -> None:
    assert not is_local(line)


@pytest.mark.parametrize(
    ("specifier", "expected"),
    [
        (">=3.11", True),
        (">=3.11,<4", True),
        ("~=3.11", True),
        ("~=3.11.5", True),
        ("==3.11.*", True),
        ("!=3.12.*", True),
        ("<=3.11.7", True),
        (">3.11.6,", True),
        ("===3.11.7", True),
        (">=3.12", False),
        ("<3.11", False),
        ("==3.11", False),
        ("~=3.10.1", False),
        ("!=3.11.*", False),
        ("what", False),
    ],
)
def test_a_version_satisfies_a_specifier_or_not(specifier: str, expected: bool) -> None:
    assert satisfies((3, 11, 7), specifier) is expected


def test_no_line_of_a_secret_of_several_lines_is_shown(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("KEY=-----BEGIN KEY-----\nMIIEvQ/IBADAN+Bg\n-----END KEY-----\n")
    assert check_variables(tmp_path) == [
        ".env:2: is not NAME=value; put a value of several lines in quotes",
        ".env:3: cannot be read; allowed: NAME=value, one per line",
    ]
