"""Small folders in the exact formats of published data sets, with random images: shared by the tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from prism_lib.data.folder import content_hash, load_info, load_table
from prism_lib.files import file_hash

CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
ISIC2019_HEADER = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"


def noise(seed: int, width: int = 48, height: int = 40, channels: int = 1) -> Image.Image:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("\n".join(lines) + "\n")


def chexpert(
    root: Path, patients: int = 12, valid: int = 3, version: str = "CheXpert-v1.0-small", side: int = 48
) -> Path:
    """Two studies per patient, the first with a lateral film; labels 1.0, 0.0, -1.0 and blank as in the original."""
    rows: dict[str, list[str]] = {"train": [], "valid": []}
    for split, first, count in (("train", 1, patients), ("valid", 64541, valid)):
        for number in range(first, first + count):
            for study in (1, 2):
                for view, kind in ((1, "frontal"), (2, "lateral"))[: 3 - study]:
                    file = f"{split}/patient{number:05d}/study{study}/view{view}_{kind}.jpg"
                    save(noise(number * 10 + study * 3 + view, side, side - 8), root / file)
                    values = chexpert_labels(number)
                    about = ["Male" if number % 2 else "Female", str(40 + number % 40), kind.capitalize()]
                    row = [f"{version}/{file}", *about, "AP" if kind == "frontal" else "", *values]
                    rows[split].append(",".join(row))
    for split, lines in rows.items():
        write_lines(root / f"{split}.csv", [CHEXPERT_HEADER, *lines])
    return root


def chexpert_labels(number: int) -> list[str]:
    """Fourteen values: effusion and heart in every combination, devices present, blank, absent or uncertain."""
    names = CHEXPERT_HEADER.split(",")[5:]
    values = dict.fromkeys(names, "")
    values["Cardiomegaly"] = ("1.0", "0.0")[number % 2]
    values["Pleural Effusion"] = ("1.0", "0.0")[number // 2 % 2]
    values["Support Devices"] = ("1.0", "", "0.0", "-1.0", "1.0")[number % 5]
    return [values[name] for name in names]


def isic2019(root: Path, lesions: int = 16, side: int = 48, artefacts: bool = True) -> Path:
    """Two images per lesion, and one lesion of no name; every second image has artefact labels."""
    truth, about, bias = [ISIC2019_HEADER], ["image,age_approx,anatom_site_general,lesion_id,sex"], []
    for index in range(2 * lesions):
        name = f"ISIC_{index:07d}{'_downsampled' if index % 4 == 0 else ''}"
        save(noise(index, side, side - 8, 3), root / "ISIC_2019_Training_Input" / f"{name}.jpg")
        lesion = index // 2
        hot = ["1.0" if lesion % 2 == column else "0.0" for column in range(9)]
        truth.append(",".join([name, *hot]))
        about.append(f"{name},{55.0},posterior torso,{f'MSK4_{lesion:07d}' if lesion else ''},{'fe' * (index % 2)}male")
        if index % 2:
            bias.append(f"ISIC_{index:07d}.png;{index % 4 // 2};{(index + 1) % 4 // 2};0")
    write_lines(root / "ISIC_2019_Training_GroundTruth.csv", truth)
    write_lines(root / "ISIC_2019_Training_Metadata.csv", about)
    if artefacts:
        write_lines(root / "isic_bias.csv", ["image;ruler;dark_corner;ink", *bias])
    return root


def dicom(path: Path, pixels: np.ndarray, **fields: object) -> Path:
    """A digital radiograph as its maker writes it, with a name and a date of birth; `fields` by keyword."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientName, data.PatientBirthDate, data.PatientID = "Doe^Jane", "19500101", "SECRET-1"
    data.PatientAge, data.Modality = "067Y", "DX"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelData = pixels.tobytes()
    for keyword, value in fields.items():
        if keyword == "TransferSyntaxUID":
            meta.TransferSyntaxUID = value
        elif value is None:
            delattr(data, keyword)
        else:
            setattr(data, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def table(root: Path, name: str, **columns: list[object]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_csv(root / name, index=False)
    return root


def verify(folder: Path) -> None:
    """The hash in dataset.json is that of the folder's table and image files."""
    hashes = {name: file_hash(folder / name) for name in load_table(folder)["file_name"]}
    assert content_hash(folder, hashes) == load_info(folder)["content_hash"]
