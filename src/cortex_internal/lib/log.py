"""`from cortex_internal.lib.log import logger`: the structured logger, which is `cortex.logger`."""

from cortex.logger import logger

__all__ = ["logger"]
