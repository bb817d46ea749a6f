"""The code that runs outside the operator: the fork server, the supervising process, the job's
process.

It runs in the interpreter of the user's environment, and therefore needs the standard library alone
and any CPython from 3.9 on. Processes that fork load as little as possible. Engines import its data
(`messages`, `processes`, `cgroups`).
"""
