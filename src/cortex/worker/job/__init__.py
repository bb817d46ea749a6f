"""The process of a job: it is set up, runs the command or the task, and ends as Python ends."""
