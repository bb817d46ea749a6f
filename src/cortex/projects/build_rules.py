"""An operator's rules for builds: the time limit, and which of the operator's environment variables
a build gets. The operator's settings make them; `builder` applies them.

A build runs code of the project and of packages, as jobs do. It gets the variables that installing
needs (proxies, certificates, indexes with their credentials, compilers) and no others that the
operator was started with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_NAMES = frozenset(
    {
        # The user; replaced if builds run as another account.
        *("HOME", "LOGNAME", "SHELL", "USER"),
        *("LANG", "LANGUAGE", "PATH", "TZ"),
        # Certificates and logins of hosts.
        *("CURL_CA_BUNDLE", "NETRC", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE"),
        *("GIT_ASKPASS", "GIT_TERMINAL_PROMPT"),
        # Compilers and their options.
        *("AR", "ARFLAGS", "CC", "CFLAGS", "CPP", "CPPFLAGS", "CXX", "CXXFLAGS", "LD", "LDFLAGS"),
        *("F77", "FC", "FFLAGS", "FCFLAGS", "LDSHARED", "NVCC", "RANLIB", "STRIP"),
        *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH"),
        *("MAKE", "MAKEFLAGS", "MAX_JOBS", "SOURCE_DATE_EPOCH", "TORCH_CUDA_ARCH_LIST"),
        *("CARGO_HOME", "RUSTFLAGS", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN", "JAVA_HOME"),
    }
)
_PREFIXES = (
    *("LC_", "UV_", "PIP_", "GIT_CONFIG_", "GIT_SSH", "GIT_SSL_"),
    *("CMAKE_", "CUDA", "PKG_CONFIG", "SETUPTOOLS_"),
)
# The operator's own folders, which are not for another account.
_OWN_FOLDERS = "XDG_"
_PROXIES = frozenset({"all_proxy", "ftp_proxy", "http_proxy", "https_proxy", "no_proxy"})
# These would make uv or a build use the operator's own environment, or contradict --python.
_MISLEADING = frozenset(
    {
        *("CONDA_PREFIX", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"),
        *("UV_PYTHON", "UV_SYSTEM_PYTHON"),
    }
)
_PUBLISH_PREFIX = "UV_PUBLISH_"


@dataclass(frozen=True)
class BuildRules:
    """The rules of one operator."""

    timeout_s: float = 1800
    variables: frozenset[str] = frozenset()
    """The names of further variables that builds get."""

    def inherited(self, environ: Mapping[str, str], *, is_own_user: bool) -> dict[str, str]:
        """The variables of the operator's environment that a build gets.

        Args:
            is_own_user: whether builds run as the operator's own user.
        """
        return {
            name: value
            for name, value in environ.items()
            if name not in _MISLEADING
            and (
                name in self.variables
                or name in _NAMES
                or name.lower() in _PROXIES
                or (name.startswith(_PREFIXES) and not name.startswith(_PUBLISH_PREFIX))
                or (is_own_user and name.startswith(_OWN_FOLDERS))
            )
        }


DEFAULT_RULES = BuildRules()
