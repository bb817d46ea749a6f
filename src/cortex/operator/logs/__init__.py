"""Logs of jobs: followed while a job runs, archived in the object store when it has finished."""
