"""The findings that ctclip scores, by their CT-RATE names."""

from typing import Literal, get_args

Finding = Literal[
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
]

FINDINGS: tuple[str, ...] = get_args(Finding)
"""The 18 findings in the column order of CT-RATE's label tables (Hamamci et al. 2024)."""
