"""Are a mixture's experts diverse, do they complement one another, and does the router use it?"""

from mllm.diagnosis.command import diagnose_checkpoint
from mllm.diagnosis.data import DiagnosticData, read_diagnostic_data, scenes_data
from mllm.diagnosis.measure import Diagnosis, diagnose
from mllm.diagnosis.plots import draw_diagnosis, draw_patches
from mllm.diagnosis.table import diagnosis_table

__all__ = [
    "Diagnosis",
    "DiagnosticData",
    "diagnose",
    "diagnose_checkpoint",
    "diagnosis_table",
    "draw_diagnosis",
    "draw_patches",
    "read_diagnostic_data",
    "scenes_data",
]
