"""The user's task file under a name that every process of a job can import: `cortex_task`, for a file whose
own name `import` would not find or would take for another module. The local engine links it into the folder
that each job has on its path; a process that multiprocessing spawns finds the task's functions by it.
"""

import os
from importlib.machinery import SourceFileLoader

__file__ = os.environ["CORTEX_TASK_FILE"]
exec(SourceFileLoader(__name__, __file__).get_code(__name__) or "", globals())
