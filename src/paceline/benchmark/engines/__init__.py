"""The engines that are measured: each module builds a Subject (benchmark/job.py) of a Job."""
