"""Small folders in the exact formats of published data sets, with random images: shared by the tests."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from prism_lib.data.chest import ARCHIVES
from prism_lib.data.folder import load_info, load_table
from prism_lib.files import file_hash
from prism_lib.phantom.patients import render, sample_patients

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


def write_gz(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))


LABELS = CHEXPERT_HEADER.split(",")[5:]
MIMIC_METADATA = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
    "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
)
MIMIC_VIEWS = ("PA", "AP", "LATERAL", "LL", "", "LAO")


def mimic(root: Path, patients: int = 20) -> Path:
    """Six views per patient, one study each; patient 0's first study has no row of labels; splits by patient."""
    about, splits = [MIMIC_METADATA], ["dicom_id,study_id,subject_id,split"]
    labels = {"chexpert": [f"subject_id,study_id,{','.join(sorted(LABELS))}"]}
    labels["negbio"] = labels["chexpert"].copy()
    for number in range(patients):
        subject = 10000032 + 500000 * number
        split = ("train", "validate", "test", "train", "train")[number % 5]
        for place, view in enumerate(MIMIC_VIEWS):
            study, name = 50414267 + 10 * number + place, f"{number:08x}-{place:08x}-66c2a2bf-18b4d0aa-0d5d0d2c"
            file = root / "files" / f"p{str(subject)[:2]}" / f"p{subject}" / f"s{study}" / f"{name}.jpg"
            save(noise(number * 10 + place), file)
            about.append(f"{name},{subject},{study},CHEST (PA AND LAT),{view},40,48,21800506,213014.531,,,Erect")
            splits.append(f"{name},{study},{subject},{split}")
            if number or place:
                values = dict(zip(LABELS, chexpert_labels(number), strict=True))
                row = f"{subject},{study}," + ",".join(values[label] for label in sorted(LABELS))
                labels["chexpert"].append(row)
                labels["negbio"].append(row.replace("-1.0", "1.0"))
    write_gz(root / "mimic-cxr-2.0.0-metadata.csv.gz", about)
    write_gz(root / "mimic-cxr-2.0.0-split.csv.gz", splits)
    for name, lines in labels.items():
        write_gz(root / f"mimic-cxr-2.0.0-{name}.csv.gz", lines)
    return root


CHEXPERT_PLUS_HEADER = (
    "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,patient_report_date_order,report,section_narrative,"
    "section_clinical_history,section_history,section_comparison,section_technique,section_procedure_comments,"
    "section_findings,section_impression,section_end_of_impression,section_summary,section_accession_number,age,sex,"
    "race,ethnicity,interpreter_needed,insurance_type,recent_bmi,deceased,split"
)


def chexpert_plus(root: Path, patients: int = 12, valid: int = 3, images: str = "PNG") -> Path:
    """The patients of `chexpert`, one study each with a frontal and a lateral film; reports hold line breaks."""
    rows, labels = [], []
    for split, first, count in (("train", 1, patients), ("valid", 64541, valid)):
        for number in range(first, first + count):
            for kind in ("frontal", "lateral"):
                stem = f"{split}/patient{number:05d}/study1/view1_{kind}"
                save(noise(number * 10 + len(kind) + (kind == "lateral")), root / images / f"{stem}.png")
                row = dict.fromkeys(CHEXPERT_PLUS_HEADER.split(","), "")
                row |= {"path_to_image": f"{stem}.jpg", "path_to_dcm": f"{stem}.dcm", "age": "61.0", "split": split}
                row |= {
                    "deid_patient_id": f"patient{number:05d}",
                    "frontal_lateral": kind.capitalize(),
                    "race": "Asian",
                }
                row |= {"sex": "Female", "ap_pa": "AP" if kind == "frontal" else "", "report": "IMPRESSION:\n1. None."}
                rows.append(row)
                values = {
                    label: float(v) if v else None for label, v in zip(LABELS, chexpert_labels(number), strict=True)
                }
                labels.append({"path_to_image": f"{stem}.jpg", **values})
    pd.DataFrame(rows).to_csv(root / "df_chexpert_plus_240401.csv", index=False)
    (root / "chexbert_labels").mkdir()
    for section in ("impression", "findings", "report"):
        own = [row | ({"Edema": 1.0} if section == "report" else {}) for row in labels]
        write_lines(root / "chexbert_labels" / f"{section}_fixed.json", map(json.dumps, own))
    return root


PADCHEST_HEADER = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,Projection,"
    "MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,PhotometricInterpretation_DICOM,"
    "PixelRepresentation_DICOM,PixelAspectRatio_DICOM,SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,"
    "WindowWidth_DICOM,Rows_DICOM,Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,ExposureTime,"
    "RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,Localizations,LabelsLocalizationsBySentence,"
    "labelCUIS,LocalizationsCUIS"
)
PADCHEST_LABELS = (
    "['normal']",
    "['cardiomegaly', 'pleural effusion', ' NSG tube', 'scoliosis']",
    "['loculated pleural effusion', 'rib fracture', 'costophrenic angle blunting']",
    "['hydropneumothorax', '']",
    "['unchanged']",
    "['normal', 'hiatal hernia']",
    "",
    "['pacemaker', 'aortic elongation']",
)
PADCHEST_VIEWS = ("PA", "L", "AP", "AP_horizontal", "PA", "COSTAL", "PA", "PA")


def padchest(root: Path, patients: int = 16) -> Path:
    """Eight 16-bit films per patient over two numbered folders, with every kind of cell in `Labels`."""
    rows = []
    for number in range(patients):
        for place, (labels, view) in enumerate(zip(PADCHEST_LABELS, PADCHEST_VIEWS, strict=True)):
            name, folder = f"{number:04d}8401113669640{place}_00-163-058.png", str(number % 2 * 53)
            levels = np.random.default_rng(number * 10 + place).integers(0, 65536, (40, 48), np.uint16)
            save(Image.fromarray(levels), root / folder / name)
            row = dict.fromkeys(PADCHEST_HEADER.split(","), "")
            row |= {"": str(len(rows)), "ImageID": name, "ImageDir": folder, "StudyDate_DICOM": "20140915"}
            row |= {"PatientID": f"{number:05d}abc", "PatientBirth": "1930.0", "PatientSex_DICOM": "MFO"[number % 3]}
            row |= {"Projection": view, "Report": "sin cambios, silueta", "Labels": labels}
            row |= {"MethodLabel": ("Physician", "RNN_model")[number % 4 == 3], "Pediatric": "No"}
            rows.append(row)
    pd.DataFrame(rows).to_csv(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", index=False)
    return root


VINDR_LABELS = (
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,Edema,Emphysema,"
    "Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,Mediastinal shift,Nodule/Mass,Pleural effusion,"
    "Pleural thickening,Pneumothorax,Pulmonary fibrosis,Rib fracture,Other lesion,COPD,Lung tumor,Pneumonia,"
    "Tuberculosis,Other diseases,No finding"
)
VINDR_SEEN = (  # by three readers
    ("No finding", "No finding", "No finding"),
    ("Cardiomegaly", "Cardiomegaly", "No finding"),
    ("Rib fracture", "Clavicle fracture", "Aortic enlargement"),
    ("Nodule/Mass", "No finding", "No finding"),
    ("Pleural effusion", "Pleural effusion", "Pleural effusion"),
)


def vindr(root: Path, train: int = 20, test: int = 4, readers: int = 3) -> Path:
    """DICOM films; a row per image and reader of train, one per image of test, whose last columns differ in a name."""
    names = VINDR_LABELS.split(",")
    for part, count in (("train", train), ("test", test)):
        lines = [("image_id,rad_id," if part == "train" else "image_id,") + VINDR_LABELS]
        lines[0] = lines[0] if part == "train" else lines[0].replace("Other diseases", "Other disease")
        for number in range(count):
            image = f"{part[1]}{number:03d}50a418190bc3fb1ef1633bf9678"
            levels = np.random.default_rng([number, count]).integers(0, 4096, (40, 48), np.uint16)
            dicom(root / part / f"{image}.dicom", levels, BitsStored=12, HighBit=11, PixelSpacing=[0.2, 0.2])
            for reader, seen in enumerate(VINDR_SEEN[number % 5][: readers if part == "train" else 1]):
                marks = ",".join(str(int(name == seen)) for name in names)
                lines.append(f"{image},R{reader + 8},{marks}" if part == "train" else f"{image},{marks}")
        (root / "annotations").mkdir(exist_ok=True)
        write_lines(root / "annotations" / f"image_labels_{part}.csv", lines)
    return root


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
    content = hashlib.sha256((folder / "metadata.csv").read_bytes())
    for name in load_table(folder)["file_name"]:
        content.update(name.encode() + bytes.fromhex(file_hash(folder / name)))
    assert content.hexdigest() == load_info(folder)["content_hash"]


def nih_films(root: Path, size: int) -> Path:
    """A folder in NIH's format: phantoms without devices stand for films, two of each of nine patients."""
    rows = []
    (root / "images").mkdir(parents=True)
    patients = sample_patients(18, 7).intervene(support_devices=0)
    for number, image in enumerate((render(patients, size)[:, 0] * 255).byte().numpy()):
        name = f"{number // 2:08d}_{number % 2:03d}.png"
        Image.fromarray(image).save(root / "images" / name)
        rows.append([name, ["No Finding", "Effusion"][number % 2], number // 2, 50, "F", "PA"])
    table = pd.DataFrame(rows, columns=list(ARCHIVES["nih"].tables[0].columns))
    table.to_csv(root / "Data_Entry_2017_v2020.csv", index=False)
    return root
