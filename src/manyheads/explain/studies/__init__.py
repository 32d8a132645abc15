"""Published findings as experiments, each about a minute a seed on one core, with their plots.

run_study("scan-and-snap", "results")  # writes results/study.json and results/study.html
"""

from manyheads.explain.studies.running import run_study
from manyheads.explain.studies.study import Study, Verdict, create_study, list_studies, register_study

__all__ = ["Study", "Verdict", "create_study", "list_studies", "register_study", "run_study"]
