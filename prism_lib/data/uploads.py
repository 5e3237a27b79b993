"""Read an uploaded image file of any content in bounded memory; every refusal is one plain sentence for the user."""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from pydicom.uid import DeflatedExplicitVRLittleEndian
from torch import Tensor

from prism_lib.data.dicom import is_dicom
from prism_lib.data.images import ImageFiles

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 40_000_000  # checked before any is decoded; a mammogram, the largest plain film, has some 20 million
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")
ACCEPT = ".png,.jpg,.jpeg,.tif,.tiff,.bmp,.webp,.dcm,.dicom"


def read_upload(name: str, content: bytes, size: int, mode: str = "L") -> Tensor:
    """The image of an uploaded file, (1, C, size, size) in [0, 1]; C is 3 in mode "RGB". ValueError says why not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(content)
        return read_file(path, size, mode, name)


def check_length(name: str, length: int) -> None:
    """ValueError for a file that is empty or too long, in bytes."""
    if length == 0:
        raise ValueError(f"{name} is empty (0 bytes).")
    if length > MAX_BYTES:
        raise ValueError(f"{name} has {length / 2**20:.0f} MB; at most {MAX_BYTES // 2**20} MB are read.")


def read_file(path: Path, size: int, mode: str = "L", name: str = "") -> Tensor:
    """As `read_upload`, for a file of this machine; messages say `name`, by default the file's own."""
    name = name or path.name
    check_length(name, path.stat().st_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the faults behind these warnings are refused below, or harmless
        try:
            if is_dicom(path) and DeflatedExplicitVRLittleEndian.encode() in path.read_bytes():  # it hides the size
                raise ValueError("a deflated DICOM, which is not unpacked; save it without compression")
            levels = ImageFiles(size, mode=mode, formats=FORMATS, max_pixels=MAX_PIXELS).read(path).pixels
        except MemoryError:
            raise ValueError(f"{name} needs more memory than there is.") from None
        except Exception as error:  # decoders raise any exception when a file is damaged
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise ValueError(f"{name} cannot be used: {reason}.") from None
    return torch.from_numpy(np.atleast_3d(levels)).permute(2, 0, 1)[None].float() / 255
