"""What runs outside the operator: the fork server, the supervisor of a job, and the job's process.

Standard library alone and any CPython from 3.9 on, because it runs in the interpreter of the user's
environment; what forks stays lean. Engines import its data (`messages`, `processes`, `cgroups`).
"""
