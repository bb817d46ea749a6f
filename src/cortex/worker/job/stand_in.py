"""The user's task file under the name `cortex_task`, which every process of a job can import. It is
used for a file whose own name `import` would not find or would take for another module. The local
engine links this module into a folder on the path of each job: a process that multiprocessing
spawns finds the task's functions through it.
"""

import os
from importlib.machinery import SourceFileLoader

__file__ = os.environ["CORTEX_TASK_FILE"]
exec(SourceFileLoader(__name__, __file__).get_code(__name__) or "", globals())
