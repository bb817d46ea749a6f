"""What an operator lets builds do: how long they may take, and which variables of its environment they find. Used by
`building`; the operator's settings make the rules.

A build runs code of the project and of packages, as jobs do: it finds what installing takes (proxies, certificates,
indexes with their credentials, compilers) and none of what else the operator was started with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_NAMES = frozenset(
    {
        # The user, who is another one where builds run as an account.
        *("HOME", "LOGNAME", "SHELL", "USER"),
        *("LANG", "LANGUAGE", "PATH", "TZ"),
        # Certificates and logins of hosts.
        *("CURL_CA_BUNDLE", "NETRC", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE"),
        *("GIT_ASKPASS", "GIT_TERMINAL_PROMPT"),
        # Compilers and what they are told.
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
# An account has folders of its own.
_OF_THE_HOME = "XDG_"
_PROXIES = frozenset({"all_proxy", "ftp_proxy", "http_proxy", "https_proxy", "no_proxy"})
# They would make uv or a build see the operator's own environment, or contradict --python.
_MISLEADING = frozenset(
    {
        *("CONDA_PREFIX", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"),
        *("UV_PYTHON", "UV_SYSTEM_PYTHON"),
    }
)
_NOT_FOR_INSTALLING = "UV_PUBLISH_"


@dataclass(frozen=True)
class BuildRules:
    """Those of one operator."""

    timeout_s: float = 1800
    variables: frozenset[str] = frozenset()
    """Names of those that builds find beside the ones that all do."""

    def inherited(self, environ: Mapping[str, str], *, is_own_user: bool) -> dict[str, str]:
        """What a build finds of an environment.

        Args:
            is_own_user: whether builds run as the user whose environment it is.
        """
        return {
            name: value
            for name, value in environ.items()
            if name not in _MISLEADING
            and (
                name in self.variables
                or name in _NAMES
                or name.lower() in _PROXIES
                or (name.startswith(_PREFIXES) and not name.startswith(_NOT_FOR_INSTALLING))
                or (is_own_user and name.startswith(_OF_THE_HOME))
            )
        }


DEFAULT_RULES = BuildRules()
