"""`from cortex_internal.lib.log import logger`: Cortex's structured logger, which is
`cortex.logger` here."""

from cortex.logger import logger

__all__ = ["logger"]
