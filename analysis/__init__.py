"""Mathematics over the tables of a store; knows neither models nor Ray."""

from analysis.errors import AnalysisError
from analysis.overlap import Analysis, analyse_run, overlap_of_scores
from analysis.settings import AnalysisSettings

__all__ = ["Analysis", "AnalysisError", "AnalysisSettings", "analyse_run", "overlap_of_scores"]
