"""Mathematics over the tables of a store; knows neither models nor Ray."""

from analysis.drift import Drift, compare_runs
from analysis.errors import AnalysisError
from analysis.keeping import Analysis
from analysis.overlap import analyse_run, overlap_of_scores
from analysis.settings import AblationSettings, AnalysisSettings, CrossSettings

__all__ = [
    "AblationSettings",
    "Analysis",
    "AnalysisError",
    "AnalysisSettings",
    "CrossSettings",
    "Drift",
    "analyse_run",
    "compare_runs",
    "overlap_of_scores",
]
