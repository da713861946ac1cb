"""Before a day is spent: is there an interaction, which rank, data enough, and which modality carries what.

python -m mmfusion.diagnose --data my_arrays.npz          prints one page and writes diagnosis-my_arrays.html

found = diagnose(dataset_from_arrays({"audio": x, "video": z, "target": y}, ArraysConfig(hold_out=0.2)))
found.interacts, found.rank, found.detectable
"""

from mmfusion.diagnose.inner import Budget
from mmfusion.diagnose.measure import Diagnosis, Modality, diagnose
from mmfusion.diagnose.page import diagnosis_page, diagnosis_text

__all__ = ["Budget", "Diagnosis", "Modality", "diagnose", "diagnosis_page", "diagnosis_text"]
