"""The configuration of an operator: precedence, mistakes with their places, `--show-config`."""

from __future__ import annotations

import re
import runpy
import socket
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from pydantic import Field
from ruamel.yaml import YAML

from cortex.cli.main import run
from cortex.cli.options import DataDir, StoreUrl
from cortex.engines.base import Capacity
from cortex.engines.local import machine
from cortex.errors import StartupError
from cortex.operator.app import guess_url
from cortex.operator.config import schema, sources
from cortex.operator.config.schema import Configuration, Setting, Several, described, flag, variable
from cortex.operator.config.sources import Effective, load

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
STORE = "postgresql://me:s3cret@db/tasks"


def loaded(
    tmp_path: Path, text: str = "", environ: dict[str, str] | None = None, **flags: object
) -> Effective:
    file = tmp_path / "operator.yaml"
    file.write_text(text)
    return load(flags, file if text else None, environ or {})


def mistakes(*arguments: object, **more: object) -> list[str]:
    with pytest.raises(StartupError) as error:
        loaded(*arguments, **more)  # type: ignore[arg-type]
    first, *others = error.value.message.splitlines()
    assert first == "the configuration has mistakes:"
    return others


def test_precedence_is_flag_environment_file(tmp_path: Path) -> None:
    text = "port: 1\ngrace: 1\nkeep_jobs: 1\n"
    environ = {"CORTEX_SERVE_PORT": "2", "CORTEX_SERVE_GRACE": "2", "OTHER": "x"}
    found = loaded(tmp_path, text, environ, port=3, keep_logs=None)
    configuration = found.configuration
    assert (configuration.port, configuration.grace, configuration.keep_jobs) == (3, 2, 1)
    assert configuration.keep_logs == 30
    file = tmp_path / "operator.yaml"
    assert found.sources == {
        "port": "--port", "grace": "$CORTEX_SERVE_GRACE", "keep_jobs": f"{file}:3",
    }  # fmt: skip


def test_a_flag_can_switch_off_what_a_file_switches_on(tmp_path: Path) -> None:
    text = "require_token: true\ninsecure: yes\n"
    configuration = loaded(tmp_path, text, require_token=False).configuration
    assert (configuration.require_token, configuration.insecure) == (False, True)


def test_every_setting_can_be_given_in_every_way(tmp_path: Path) -> None:
    local = {"cpu": 1.5, "mem": "2Gi", "gpu": 1, "run_as": "root"}
    ray = {
        "engine": "ray",
        "ray_address": "h:1",
        "ray_node_dir": "/n",
        "ray_autoscaler": True,
    }
    none = {**dict.fromkeys([*local, *ray]), "ray_autoscaler": False}
    _check_all_ways(tmp_path, {**none, "engine": "local", **local})
    _check_all_ways(tmp_path, {**none, **ray})


def _check_all_ways(tmp_path: Path, engine: dict[str, object]) -> None:
    given = {
        **engine,
        "host": "h", "port": 1, "data_dir": "/d", "store": STORE,
        "advertise": "http://me:1", "lease": 2.0,
        "files": "s3://bucket/prefix", "lost_folder": "f1",
        "grace": 3.0, "build_timeout": 60.0, "build_env": ["A_B", "c1"],
        "keep_jobs": 4.0, "keep_logs": 5.0, "keep_count": 6, "keep_audit": 7.0,
        "max_waiting_bytes": "7Mi",
        "require_token": True, "insecure": True, "allow_origin": ["https://a", "https://b"],
        "allow_host": ["a.example", "b:1"],
    }  # fmt: skip
    assert given.keys() == Configuration.model_fields.keys()
    words = {
        variable(name): ", ".join(value) if isinstance(value, list) else str(value)
        for name, value in given.items()
        if value is not None
    }
    with (tmp_path / "dumped.yaml").open("w") as file:
        YAML().dump(given, file)
    by_flag = load(given, None, {}).configuration
    assert by_flag.model_dump(mode="json") == given
    assert load({}, None, words).configuration == by_flag
    assert load({}, None, {"CORTEX_CONFIG": file.name}).configuration == by_flag


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"engine": "ray"}, "--engine ray needs --ray-address HOST:PORT"),
        (
            {"engine": "ray", "ray_address": "h:1", "cpu": 2},
            "--cpu needs --engine local",
        ),
        (
            {"advertise": "http://h:1"},
            "--advertise needs --store: it is for several operators on one store",
        ),
        (
            {"ray_address": "h:1"},
            "--ray-address, --ray-node-dir and --ray-autoscaler need --engine ray",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_reported(
    tmp_path: Path, flags: dict[str, object], words: str
) -> None:
    assert mistakes(tmp_path, **flags) == [words]


def test_settings_are_made_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "detect", lambda: Capacity(cpu_m=1, mem=1, gpu=1))
    text = "cpu: 1.5\nmem: 2Gi\ngpu: 0\nkeep_jobs: 1\nkeep_logs: 0\ndata_dir: x\n"
    settings = loaded(tmp_path, text).configuration.settings()
    assert settings.capacity is not None
    assert (settings.capacity.cpu_m, settings.capacity.mem) == (1500, 2 << 30)
    assert (settings.retention.jobs_s, settings.retention.logs_s, settings.retention.jobs) == (
        86_400,
        None,
        None,
    )
    assert settings.data_dir.is_absolute()
    assert settings.database_url == f"sqlite:///{Path.cwd()}/x/operator.db"


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("localhost", "http://localhost:1"),
        ("::1", "http://[::1]:1"),
        ("0.0.0.0", f"http://{socket.getfqdn()}:1"),
    ],
)
def test_the_address_for_other_operators_is_where_it_listens(host: str, address: str) -> None:
    assert guess_url(host, 1) == address


def test_all_mistakes_are_reported_with_their_places(tmp_path: Path) -> None:
    text = "port: 70000\nkeep_job: 3\nmem: [1]\nstore: mysql://u:s3cret@h/d\ngrace: 1\ncpu: true\n"
    environ = {"CORTEX_SERVE_GRACE": "-1", "CORTEX_SERVE_PROT": "1", "CORTEX_SERVE_HOST": ""}
    reported = mistakes(tmp_path, text, environ, keep_count=0)
    file = tmp_path / "operator.yaml"
    for begins, has in [
        (f"{file}:1: port: ", "65535; found 70000"),
        (f"{file}:2: keep_job: ", 'did you mean "keep_jobs"?'),
        (f"{file}:3: mem: ", "a valid string"),
        (f"{file}:4: store: ", "is not a supported database"),
        ("$CORTEX_SERVE_GRACE: ", "found '-1'"),
        ("$CORTEX_SERVE_PROT: ", 'did you mean "CORTEX_SERVE_PORT"?'),
        ("--keep-count: ", "found 0"),
    ]:
        (line,) = (line for line in reported if line.startswith(begins))
        assert has in line
    assert len(reported) == 7
    assert "s3cret" not in "".join(reported)


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("a: [", "operator.yaml:1: cannot be read as YAML"),
        ("- port: 1\n", "1: found a list; allowed: settings by name"),
        ("port: 1\nport: 2\n", "operator.yaml:2: "),
        ("host: 2020-01-01\n", "operator.yaml:1: host: "),
        ("grace: .inf\n", "operator.yaml:1: grace: "),
        ("mem: 16 gigs\n", 'write 16Gi; found "16 gigs"'),
        ("host: {a: 1}\n", "found an object"),
    ],
)
def test_a_mistake_in_a_file_is_reported_with_its_line(tmp_path: Path, text: str, has: str) -> None:
    assert has in "\n".join(mistakes(tmp_path, text))


def test_a_missing_file_is_reported_with_the_option_that_names_it(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(StartupError, match=r"\n--config: .*nowhere cannot be read"):
        load({}, nowhere, {})
    with pytest.raises(StartupError, match=r"\n\$CORTEX_CONFIG: .*nowhere cannot be read"):
        load({}, None, {"CORTEX_CONFIG": str(nowhere)})


@pytest.mark.parametrize(
    "store",
    [
        "postgresql://u:s3cret@h:port/d", "s3cret", "postgresql://u:s3cret@h", "mysql://u:s3cret@h/d",
        "postgresql+asyncpg://u:s3cret@h/d", "sqlite:///s3cret.db",
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_store_has_no_password(tmp_path: Path, store: str) -> None:
    (reported,) = mistakes(tmp_path, store=store)
    why = r"(not a valid URL|'[a-z+]+' is not a supported database|the name of the database is missing)"
    assert re.match(rf"--store: {why}; write postgresql://", reported)
    assert "s3cret" not in reported


@pytest.mark.parametrize(
    "name",
    [
        "",
        "*",
        "*.example.org",
        "https://a",
        "a b",
        "a:70000",
        "a:b",
        "a/b",
        "m\xfcller.example",
        "::1",
        "u@a",
    ],
)
def test_an_invalid_host_name_is_reported(tmp_path: Path, name: str) -> None:
    (reported,) = mistakes(tmp_path, allow_host=["fine.example", name])
    assert reported == (
        "--allow-host: not a host name; write tasks.example.org or tasks.example.org:8080, each name by "
        f"itself, without https:// and in ASCII (xn--…); found {name!r}"
    )


def test_the_shown_configuration_is_a_file_with_the_same_meaning(tmp_path: Path) -> None:
    found = loaded(tmp_path, "keep_logs: 7\n", {"CORTEX_SERVE_MEM": "1e9"}, data_dir=Path("/d"))
    shown = found.as_yaml()
    (tmp_path / "shown.yaml").write_text(shown)
    assert load({}, tmp_path / "shown.yaml", {}).configuration == found.configuration
    lines = dict(re.findall(r"^(\w+): .*# (.+)$", shown, re.M))
    assert lines.keys() == Configuration.model_fields.keys()
    assert lines["mem"] == "$CORTEX_SERVE_MEM"
    assert lines["data_dir"] == "--data-dir"
    assert lines["keep_logs"].endswith("operator.yaml:1")
    assert lines["port"] == "default"


def test_the_error_for_an_invalid_object_store_has_no_secret(tmp_path: Path) -> None:
    (reported,) = mistakes(tmp_path, files="s3://key:s3cret@bucket")
    assert reported.startswith("--files: credentials are not allowed in the URL")
    assert "s3cret" not in reported


@pytest.mark.parametrize(
    "store",
    [
        STORE,
        "postgres://me@db/tasks?password=s3cret",
        "postgres://me:s3cret@db/tasks?sslpassword=s3cret",
        "postgres://me:x@db/tasks?oauth_client_secret=s3cret&sslmode=require",
    ],
)
def test_no_password_is_shown(tmp_path: Path, store: str) -> None:
    shown = loaded(tmp_path, store=store).as_yaml()
    assert "me:***@db/tasks" in shown
    assert "s3cret" not in shown


@pytest.mark.parametrize(
    "store", ["postgresql://me:a@s3cret@db/tasks", "postgresql://me:a@b/s3cret@db/tasks"]
)
def test_the_error_for_an_unescaped_password_does_not_show_it(tmp_path: Path, store: str) -> None:
    (reported,) = mistakes(tmp_path, store=store)
    assert "with special characters of the password as %XX" in reported
    assert "s3cret" not in reported


def test_the_page_is_made_from_the_settings() -> None:
    text = PAGE.read_text()
    page = runpy.run_path(str(PAGE.with_suffix(".py")))["page"]
    assert page(text) == text, "run `make docs`"


def test_every_setting_is_described() -> None:
    assert described(Configuration).keys() == Configuration.model_fields.keys()


@pytest.mark.parametrize(("name", "shared"), [("data_dir", DataDir), ("store", StoreUrl)])
def test_commands_that_share_a_setting_describe_it_alike(name: str, shared: Any) -> None:
    (option,) = get_args(shared)[1:]
    setting = described(Configuration)[name]
    assert (option.help, option.metavar, option.show_default) == (
        setting.help, setting.metavar, setting.unset,
    )  # fmt: skip


def test_all_that_users_see_of_a_setting_follows_from_one_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class More(Configuration):
        lamp_colours: Annotated[
            tuple[str, ...],
            Several,
            Setting("Colour of the lamp.", metavar="COLOUR", docs="Any [colour](guide.md)."),
        ] = ()
        lamp_watts: Annotated[
            Annotated[int, Field(ge=1)] | None, Setting("Power of the lamp.", unset="the mains")
        ] = None

    def shown(*arguments: str) -> str:
        code = run(["serve", *arguments])
        output = capsys.readouterr()
        return output.err if code else re.sub(" +", " ", output.out)

    monkeypatch.setattr(schema, "Configuration", More)
    monkeypatch.setattr(sources, "Configuration", More)
    help_text = shown("--help")
    assert "--lamp-colours COLOUR Colour of the lamp.\n" in help_text
    assert "--lamp-watts <int> Power of the lamp. [default: (the mains)]\n" in help_text

    by_flag = shown("--show-config", "--lamp-colours=red", "--lamp-colours=blue", "--lamp-watts=3")
    assert "lamp_colours: # --lamp-colours\n- red\n- blue\n" in by_flag
    assert "lamp_watts: 3 # --lamp-watts\n" in by_flag

    file = tmp_path / "operator.yaml"
    file.write_text("lamp_watts: 4\n")
    monkeypatch.setenv("CORTEX_SERVE_LAMP_COLOURS", "red, blue")
    by_others = shown("--show-config", f"--config={file}")
    assert "lamp_colours: # $CORTEX_SERVE_LAMP_COLOURS\n- red\n- blue\n" in by_others
    assert f"lamp_watts: 4 # {file}:1\n" in by_others
    assert "--lamp-watts: should be greater than or equal to 1; found 0" in shown("--lamp-watts=0")

    rows = runpy.run_path(str(PAGE.with_suffix(".py")))["table"](More).splitlines()
    assert rows[-2:] == [
        "| `lamp_colours` | `--lamp-colours`, once for each | `CORTEX_SERVE_LAMP_COLOURS`, with "
        "commas | none | Colour of the lamp. Any [colour](guide.md). |",
        "| `lamp_watts` | `--lamp-watts` | `CORTEX_SERVE_LAMP_WATTS` | the mains | Power of the lamp. |",
    ]  # fmt: skip


def test_the_example_of_the_page_is_valid(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert loaded(tmp_path, text).configuration.keep_logs == 7


def test_the_command_passes_on_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--host=h", "--port=1", "--data-dir=/d", f"--store={STORE}",
        "--advertise=http://me:1", "--lease=2", "--files=s3://b", "--lost-folder=f",
        "--cpu=2", "--mem=2Gi", "--gpu=1",
        "--grace=3", "--build-timeout=60", "--build-env=A_B", "--build-env=c1", "--engine=local",
        "--run-as=x", "--keep-jobs=4", "--keep-logs=5", "--keep-count=6", "--keep-audit=7",
        "--max-waiting-bytes=7Mi",
        "--require-token", "--no-insecure", "--allow-origin=a", "--allow-origin=b",
        "--allow-host=a", "--allow-host=b",
    ]  # fmt: skip
    assert run(["serve", "--show-config", *flags]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"# (.+)$", shown, re.M) == [
        "default" if name.startswith("ray_") else flag(name) for name in Configuration.model_fields
    ]
    ray = ["--engine=ray", "--ray-address=h:1", "--ray-node-dir=/n"]
    assert run(["serve", "--show-config", *ray]) == 0
    shown += capsys.readouterr().out
    assert "ray_address: h:1 # --ray-address" in re.sub(" +", " ", shown)
    assert "ray_node_dir: /n # --ray-node-dir" in re.sub(" +", " ", shown)
    assert "s3cret" not in shown
    assert run(["serve", "--show-config", "--port=-1"]) == 1
    assert "--port: should be greater than or equal to 0" in capsys.readouterr().err


def test_a_ray_cluster_is_found_as_ray_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> str | None:
        given = {"engine": "ray", "ray_address": "auto"}
        return load(given, None, {}).configuration.ray_address

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (wrong,) = mistakes(tmp_path, engine="ray", ray_address="auto")
    assert wrong.startswith("--ray-address: no Ray cluster was started on this machine")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert found() == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert found() == "10.0.0.2:6379"
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.2:10001")
    (wrong,) = mistakes(tmp_path, engine="ray", ray_address="auto")
    assert "'ray://10.0.0.2:10001' is not HOST:PORT" in wrong
