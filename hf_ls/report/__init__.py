"""What a run measured (`CalibrationReport`) and all that is made of it alone: table, sentences, plots, model card.

Works offline from `calibration.json`; importing it loads no torch.
"""

from hf_ls.report.calibration_report import CalibrationReport as CalibrationReport
from hf_ls.report.calibration_report import CalibrationRow as CalibrationRow
