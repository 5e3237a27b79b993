"""Physics and anatomy of the chest phantom: thickness maps, Beer-Lambert attenuation, film.

Each structure is a thickness map (N, H, W) in units of half the image width; x to the right and y down in [-1, 1], the
patient's left at x > 0. What an intervention can move (heart, fluid, devices) ends in a hard edge before a narrow
point-spread function, so an intervention changes no pixel far from it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

_TABLES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("anatomy.yaml").read_text(encoding="utf-8"))
NOISE: dict[str, int] = _TABLES["noise"]  # number of columns by name
SOFT, LUNG, BONE, METAL = 1.0, 0.22, 1.5, 60.0  # linear attenuation per unit thickness
LUNG_DEPTH = 1.75  # thickness of the lung where it is deepest
KIND_PROBABILITIES = (0.45, 0.40, 0.35, 0.25)


@dataclass(frozen=True)
class Scene:
    """What N radiographs show: exogenous noise, and the attributes of the patients."""

    index: tuple[int, ...]
    seed: int
    noise: dict[str, Tensor]  # floats in (0, 1), (N,) or (N, k)
    attributes: dict[str, Tensor]  # each of `patients.ATTRIBUTES`, (N,): age in years, the rest 0 or 1

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice | Sequence[int]) -> Self:
        """A sub-batch, by slice or by a list of rows."""
        chosen = torch.arange(len(self))[rows].tolist()
        return replace(
            self,
            index=tuple(self.index[row] for row in chosen),
            noise={name: value[chosen] for name, value in self.noise.items()},
            attributes={name: value[chosen] for name, value in self.attributes.items()},
        )

    @property
    def device_kinds(self) -> Tensor:
        """Which devices are in the picture: bool (N, 4), columns as `DEVICE_KINDS`."""
        noise = self.noise["kinds"]
        kinds = noise[:, :4] < torch.tensor(KIND_PROBABILITIES)
        fallback = F.one_hot((noise[:, 4] * 4).long().clamp(max=3), 4).bool()
        kinds = torch.where(kinds.any(dim=1, keepdim=True), kinds, fallback)  # never none
        return kinds & (self.attributes["support_devices"] > 0.5)[:, None]

    @property
    def effusion_sides(self) -> Tensor:
        """Where fluid is: bool (N, 2), columns right and left lung of the patient."""
        side = self.noise["effusion_side"]
        both = torch.stack([side < 0.65, side > 0.35], dim=1)
        return both & (self.attributes["pleural_effusion"] > 0.5)[:, None]


def radiograph(scene: Scene, size: int) -> Tensor:
    """Render a scene: (N, 1, size, size) in [0, 1], rounded to 8-bit gray levels."""
    frame = Frame.of(scene, size)
    lungs = Lungs.of(scene, frame)
    heart = heart_thickness(scene, frame, scene.attributes["cardiomegaly"])
    fluid = effusion_thickness(scene, frame, lungs)
    body = body_thickness(scene, frame)
    mediastinum = mediastinum_thickness(scene, frame)
    fixed = BONE * bone_thickness(scene, frame, lungs) - SOFT * stomach_gas(scene, frame, lungs)
    fixed = fixed + marker_of_sex(scene, frame)

    def attenuation(heart: Tensor, fluid: Tensor, vessels: Tensor) -> Tensor:
        air = (lungs.depth - mediastinum - heart).clamp(min=0) * (1 - fluid)
        # Vessels are blood inside the lung: where fluid or heart took the air's place they no longer show.
        aerated = air / LUNG_DEPTH
        soft = (body - air).clamp(min=0)
        return SOFT * soft + LUNG * air + 8.0 * vessels * aerated + fixed

    vessels = vessel_thickness(scene, frame)
    # Scatter comes from the whole body, so its field uses the habitus with neither finding nor device:
    # a physical simplification that gives every intervention compact support.
    zero = torch.zeros_like(fluid)
    habitus = attenuation(heart_thickness(scene, frame, torch.zeros(len(scene))), zero, zero)
    primary = torch.exp(-(attenuation(heart, fluid, vessels) + device_attenuation(scene, frame)))
    intensity = point_spread(primary) + 0.10 * _blur_wide(torch.exp(-habitus))
    gray = film(scene, intensity + quantum_noise(scene, intensity))
    gray = torch.maximum(gray, marker(scene, size)[:, 0])
    return (gray * 255).round().div(255)[:, None]


@dataclass(frozen=True)
class Frame:
    """Pixel coordinates in the patient's own frame."""

    x: Tensor  # (N, H, W), patient frame
    y: Tensor
    size: int
    rotation: Tensor  # (N,) radians
    shift: Tensor  # (N, 2)
    zoom: Tensor  # (N,)

    @classmethod
    def of(cls, scene: Scene, size: int) -> Self:
        u = scene.noise["pose"]
        # A film taken AP at the bedside is less well centred than a PA film at the stand.
        loose = 0.6 + 0.4 * scene.attributes["ap"]
        rotation = (u[:, 0] - 0.5) * 0.14 * loose
        shift = torch.stack([(u[:, 1] - 0.5) * 0.14 * loose, (u[:, 2] - 0.5) * 0.12 * loose], dim=1)
        zoom = 0.95 + 0.12 * u[:, 3]
        axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1
        gx, gy = axis[None, None, :] - shift[:, 0, None, None], axis[None, :, None] - shift[:, 1, None, None]
        cos, sin = (rotation.cos() / zoom)[:, None, None], (rotation.sin() / zoom)[:, None, None]
        return cls(cos * gx + sin * gy, -sin * gx + cos * gy, size, rotation, shift, zoom)


def tubes(points: Tensor, radius: Tensor | float, frame: Frame) -> Tensor:
    """Thickness (N, H, W), by maximum, of round tubes through dense points (N, P, 2); radius a number or (N, P)."""
    cos, sin = (frame.rotation.cos() * frame.zoom)[:, None], (frame.rotation.sin() * frame.zoom)[:, None]
    (x, y), scale = points.unbind(-1), frame.size / 2
    image = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1) + frame.shift[:, None, :]
    pixels = (image + 1) / 2 * frame.size - 0.5
    return stamp(pixels, torch.as_tensor(radius).expand(points.shape[:2]) * scale, frame.size) / scale


def stamp(pixels: Tensor, radius: Tensor, size: int) -> Tensor:
    """Chord lengths in pixels, (N, size, size), of balls at ``pixels`` (N, P, 2) with ``radius`` (N, P) in pixels."""
    count = pixels.shape[0]
    drawn = torch.where(radius > 0, radius.clamp(min=0.9), radius)  # thinner than a pixel: wider and fainter
    reach = math.ceil(float(drawn.max())) if drawn.numel() else 0
    base = pixels.round()
    fraction = pixels - base
    steps = torch.arange(-reach, reach + 1, dtype=torch.float32)
    dx2 = (steps - fraction[..., 0, None]) ** 2  # (N, P, K)
    dy2 = (steps - fraction[..., 1, None]) ** 2
    square = (drawn**2)[..., None, None] - dy2[..., :, None] - dx2[..., None, :]  # (N, P, K, K)
    fade = (radius / drawn.clamp(min=1e-6)) ** 2
    chord = 2 * square.clamp(min=0).sqrt() * fade[..., None, None]
    column = base[..., 0, None].long() + steps.long()
    row = base[..., 1, None].long() + steps.long()
    inside = ((row >= 0) & (row < size))[..., :, None] & ((column >= 0) & (column < size))[..., None, :]
    where = row.clamp(0, size - 1)[..., :, None] * size + column.clamp(0, size - 1)[..., None, :]
    flat = torch.zeros(count, size * size)
    flat.scatter_reduce_(1, where.flatten(1), (chord * inside).flatten(1), "amax")
    return flat.view(count, size, size)


def bezier(control: Tensor, count: int) -> Tensor:
    """Points (N, count, 2) on the Bezier curve with control points (N, K, 2)."""
    degree, t = control.shape[1] - 1, torch.linspace(0, 1, count)
    basis = torch.stack([math.comb(degree, k) * t**k * (1 - t) ** (degree - k) for k in range(degree + 1)], dim=1)
    return torch.einsum("pk,nkc->npc", basis, control)


def _curve(frame: Frame, count: int, *control: tuple[Tensor | float, Tensor | float]) -> Tensor:
    """Points (N, count, 2) on a Bezier curve, its control points (x, y) given as numbers or tensors (N,)."""
    values = [[torch.as_tensor(value).expand_as(frame.rotation) for value in point] for point in control]
    return bezier(torch.stack([torch.stack(point, dim=1) for point in values], dim=1), count)


def _smooth(x: Tensor) -> Tensor:
    """Smoothstep of x clamped to [0, 1]: compact support, no tails."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _ramp(x: Tensor) -> Tensor:
    """Linear ramp from 0 to 1: a quarter of `_smooth`'s cost, for edges that are narrow or faint."""
    return x.clamp(0, 1)


def _per(noise: Tensor, low: float, high: float) -> Tensor:
    """Uniform noise (N,) to a range, shaped to broadcast over (N, H, W)."""
    return (low + (high - low) * noise)[:, None, None]


def _by_side(frame: Frame, right: Tensor, left: Tensor) -> Tensor:
    """Per-patient values (N,) chosen by the side of each pixel."""
    return torch.where(frame.x < 0, right[:, None, None], left[:, None, None])


def chest_half_width(scene: Scene) -> Tensor:
    """Inner half width of the rib cage at its widest, (N,)."""
    return 0.70 + 0.06 * (scene.noise["habitus"][:, 1] - 0.5) - 0.03 * scene.attributes["female"]


def body_thickness(scene: Scene, frame: Frame) -> Tensor:
    """Soft tissue of trunk, shoulders, neck and breasts as if there were no lungs."""
    u = scene.noise["habitus"]
    a = frame.x.abs()
    depth = _per(u[:, 0], 2.35, 2.75)
    # Shoulder line: neck, then a slope down to the arm.
    slope = _per(u[:, 4], 0.34, 0.50)
    top = -1.15 + slope * _smooth((a - 0.20) / 0.55) + 0.12 * _smooth((a - 0.70) / 0.35)
    shoulder = ((frame.y - top) / 0.55).clamp(0, 1).sqrt()
    width = 0.93 + 0.04 * u[:, 1, None, None] + 0.10 * _smooth((-0.1 - frame.y) / 0.5) + 0.02 * frame.y
    lateral = (1 - (a / width).clamp(max=1) ** 6).sqrt()
    return depth * shoulder * lateral * (0.86 + 0.14 * _smooth((frame.y + 0.6) / 1.2))


def marker_of_sex(scene: Scene, frame: Frame) -> Tensor:
    """Breast shadows, attenuation (N, H, W)."""
    size = 0.20 + 0.10 * scene.noise["habitus"][:, 5]
    x = (frame.x.abs() - 0.40) / (size * 1.05)[:, None, None]
    y = (frame.y - 0.30) / size[:, None, None]
    # A pendulous breast: round below, fading above.
    radial = x**2 + torch.where(y < 0, y * 0.55, y) ** 2
    return 0.20 * (1 - radial).clamp(min=0) * scene.attributes["female"][:, None, None]


@dataclass(frozen=True)
class Lungs:
    """Lung geometry: air depth (N, H, W) and the curves that bound it, for fluid and bones."""

    depth: Tensor
    outer: Tensor  # lateral wall |x| at each pixel's height
    floor: Tensor  # height of the diaphragm at each pixel's |x|
    angle_y: Tensor  # (N, H, W) height of the costophrenic angle of the pixel's side

    @classmethod
    def of(cls, scene: Scene, frame: Frame) -> Self:
        u, v = scene.noise["habitus"], scene.noise["lungs"]
        a = frame.x.abs()
        width = chest_half_width(scene)[:, None, None]
        apex, middle = _per(u[:, 2], -0.80, -0.72), -0.05
        rise = ((middle - frame.y) / (middle - apex)).clamp(0, 1)
        outer = width * (1 - rise * rise * rise.sqrt()).clamp(min=0).sqrt()
        outer = outer * (1 + 0.07 * (frame.y - middle).clamp(0, 1))
        inner = 0.07
        half = ((outer - inner) / 2).clamp(min=1e-3)
        across = ((a - inner - half) / half).clamp(-1, 1)
        # AP films are taken supine and in less inspiration: the diaphragm stands higher.
        base = 0.52 + 0.10 * (u[:, 3] - 0.5) - 0.06 * scene.attributes["ap"]
        dome = 0.20 + 0.05 * (v[:, 0] - 0.5)
        offset = 0.03 + 0.05 * v[:, 1]  # right dome above left
        peak = _by_side(frame, base - dome - offset, base - dome)
        lateral = ((a - 0.32) / (width - 0.32)).clamp(min=0)
        medial = ((0.32 - a) / 0.32).clamp(min=0)
        drop = _by_side(frame, dome + offset, dome)
        floor = peak + drop * (lateral**2 + 0.35 * medial**2)
        taper = ((floor - frame.y) / 0.14).clamp(0, 1).sqrt() * (0.92 + 0.08 * _smooth((floor - frame.y) / 0.5))
        depth = LUNG_DEPTH * (1 - across**4).clamp(min=0).sqrt() * taper
        depth = depth * (0.72 + 0.28 * _smooth((frame.y + 0.75) / 0.5))
        return cls(depth * (a > inner), outer, floor, base[:, None, None].expand_as(depth))


def heart_thickness(scene: Scene, frame: Frame, cardiomegaly: Tensor) -> Tensor:
    """Heart as an ellipsoid, (N, H, W), 0.41-0.48 of the chest's width in health, 1.34-1.44 times that if enlarged."""
    u = scene.noise["heart"]
    magnification = 1 + 0.06 * scene.attributes["ap"]
    growth = 1 + cardiomegaly * (0.34 + 0.10 * u[:, 1])
    half = (0.41 + 0.07 * u[:, 0]) * chest_half_width(scene) * magnification * growth
    tilt = 0.55 + 0.20 * (u[:, 2] - 0.5) - 0.12 * cardiomegaly
    short = 0.74 - 0.02 * cardiomegaly
    extent = (tilt.cos() ** 2 + (short * tilt.sin()) ** 2).sqrt()
    major = half / extent
    healthy = half / growth
    # It grows mostly to the patient's left: the right border moves by a quarter of what the left does.
    x0 = 0.09 + 0.62 * (half - healthy)
    y0 = 0.19 + 0.05 * (u[:, 3] - 0.5) - 0.03 * scene.attributes["ap"] + 0.10 * (half - healthy)
    dx, dy = frame.x - x0[:, None, None], frame.y - y0[:, None, None]
    cos, sin = tilt.cos()[:, None, None], tilt.sin()[:, None, None]
    along = (cos * dx + sin * dy) / major[:, None, None]
    across = (-sin * dx + cos * dy) / (short * major)[:, None, None]
    radial = along**2 + across**2
    return (1.34 + 0.12 * cardiomegaly)[:, None, None] * (1 - radial).clamp(min=0).sqrt()


def mediastinum_thickness(scene: Scene, frame: Frame) -> Tensor:
    """Great vessels, aortic knob and hila, minus the air of trachea and main bronchi; (N, H, W)."""
    u, v = scene.noise["heart"], scene.noise["lungs"]
    older = ((scene.attributes["age"] - 20) / 70)[:, None, None]
    x, y = frame.x, frame.y
    half = 0.125 + 0.03 * u[:, 5, None, None] + 0.02 * scene.attributes["ap"][:, None, None]
    half = half + 0.05 * _smooth((-0.45 - y) / 0.3) * 0.6
    column = 1.35 * (1 - (x / half) ** 2).clamp(min=0).sqrt()
    knob_r = 0.075 + 0.02 * u[:, 4, None, None] + 0.025 * older
    knob = ((x - 0.115) / knob_r) ** 2 + ((y + 0.27) / (knob_r * 1.15)) ** 2
    aorta = 1.1 * (1 - knob).clamp(min=0).sqrt()
    # Left pulmonary artery and right hilum: soft blobs where the vessels start.
    hilum_y = _by_side(frame, v[:, 2] * 0.06 + 0.01, v[:, 2] * 0.06 - 0.04)
    hilum = ((x.abs() - 0.15) / 0.085) ** 2 + ((y - hilum_y) / 0.13) ** 2
    hila = 0.45 * (1 - hilum).clamp(min=0)
    return torch.maximum(torch.maximum(column, aorta), hila) * (y < 0.6)


def airway_thickness(frame: Frame) -> Tensor:
    """Air in trachea and main bronchi, (N, H, W)."""
    carina, count = -0.26, frame.size // 2
    trachea = _curve(frame, count, (0.0, -1.1), (0.005, -0.7), (0.0, carina))
    right = _curve(frame, count // 2, (0.0, carina), (-0.04, carina + 0.06), (-0.13, carina + 0.17))
    left = _curve(frame, count // 2, (0.0, carina), (0.06, carina + 0.08), (0.17, carina + 0.18))
    air = tubes(trachea, 0.042, frame)
    return torch.maximum(air, tubes(torch.cat([right, left], dim=1), 0.030, frame))


def bone_thickness(scene: Scene, frame: Frame, lungs: Lungs) -> Tensor:
    """Spine, ribs, clavicles, scapulae and humeral heads; also subtracts the airway, which they lie behind."""
    u = scene.noise["bones"]
    x, y = frame.x, frame.y
    a = x.abs()
    older = ((scene.attributes["age"] - 20) / 70)[:, None, None]
    density = _per(u[:, 3], 0.85, 1.15) * (1.08 - 0.22 * older)

    # Vertebrae: bodies with end plates, discs between them, pedicles as two rings' shadows.
    pitch = 0.125
    phase = (y / pitch + u[:, 0, None, None]) % 1.0
    column = (1 - (x / 0.085) ** 4).clamp(min=0).sqrt()
    plate = 1 - 0.35 * _ramp(1 - (phase - 0.5).abs().sub(0.5).abs() / 0.10)
    pedicle = 1 - (((a - 0.052) / 0.018) ** 2 + ((phase - 0.35) / 0.16) ** 2)
    spine = column * (0.20 * plate + 0.07 * pedicle.clamp(min=0).sqrt())

    # Ribs: one periodic coordinate draws them all. Posterior ribs fall away from the spine, anterior ones
    # rise again towards the side wall.
    spacing = _per(u[:, 1], 0.150, 0.170)
    cage = _ramp((lungs.outer + 0.035 - a) / 0.03) * _ramp((0.58 - y) / 0.30) * _ramp((y + 0.86) / 0.05)
    steep = _per(u[:, 2], 0.36, 0.50)
    fan = 1 + 0.10 * y
    behind = (y / fan - steep * (a - 0.02).square() + 0.07 * _ramp((a - 0.05) / 0.2)) / spacing + u[:, 0, None, None]
    posterior = _hollow(((behind % 1.0) - 0.5) / 0.21) * _ramp((a - 0.07) / 0.05)
    front = _ramp((a - 0.30 - 0.10 * _ramp((y + 0.5) / 0.8)) / 0.10)
    before = (y / fan + 0.95 * (a - 0.70) + 0.25 * (a - 0.70) ** 2) / spacing + u[:, 0, None, None] + 0.4
    anterior = _hollow(((before % 1.0) - 0.5) / 0.24)
    ribs = cage * (0.115 * posterior + 0.070 * anterior * front)

    # Clavicles and shoulder girdle.
    lift = _per(u[:, 4], -0.05, 0.03) - 0.03 * scene.attributes["ap"][:, None, None]
    axis = -0.50 + lift - 0.13 * (a - 0.1) - 0.05 * torch.sin((a - 0.1) * 7.5)
    radius = 0.030 + 0.016 * _ramp((0.2 - a) / 0.12)
    reach = _ramp((a - 0.055) / 0.03) * _ramp((0.74 - a) / 0.05)
    clavicle = 0.22 * _hollow((y - axis) / radius) * reach
    scapula_edge = 0.64 + 0.10 * u[:, 5, None, None] - 0.07 * scene.attributes["ap"][:, None, None]
    border = scapula_edge + 0.10 * (y + 0.4)
    blade = _ramp((a - border) / 0.02) * _ramp((0.12 - y) / 0.15) * _ramp((y + 0.62) / 0.08)
    scapula = blade * (0.035 + 0.07 * _ramp(1 - (a - border - 0.02).abs() / 0.025))
    head = 1 - ((a - 0.90) / 0.13) ** 2 - ((y + 0.58) / 0.14) ** 2
    humerus = 0.30 * head.clamp(min=0).sqrt()
    shaft = 0.22 * _hollow((a - 0.97) / 0.07) * _ramp((y + 0.55) / 0.05)
    bone = density * (spine + ribs + clavicle + scapula + torch.maximum(humerus, shaft))
    return bone - airway_thickness(frame) * (0.8 * SOFT / BONE)


def _hollow(v: Tensor) -> Tensor:
    """Thickness of a tube with a dense wall across its normalised radius v: brighter towards the edges."""
    square = (1 - v**2).clamp(min=0)
    return square.sqrt() + 0.45 * (square.sqrt() - (0.64 - v**2).clamp(min=0).sqrt())


def vessel_thickness(scene: Scene, frame: Frame) -> Tensor:
    """Pulmonary vessels: a random tree per lung that halves its calibre over four generations; (N, H, W)."""
    u = scene.noise["vessels"]
    count = u.shape[0]
    sign = torch.tensor([-1.0, 1.0]).view(1, 2, 1)
    trunks = 7
    fan = torch.linspace(-1.25, 1.45, trunks).view(1, 1, -1)
    angle = fan + (u[:, :14].reshape(count, 2, trunks) - 0.5) * 0.35
    length = 0.15 + 0.07 * u[:, 14:28].reshape(count, 2, trunks)
    start = torch.stack([sign.expand(count, 2, trunks) * 0.13, torch.full((count, 2, trunks), 0.0)], dim=-1)
    bend = u[:, 28:36].reshape(count, 2, 4)
    radius, step = 0.021, max(8, frame.size // 14)
    drawn = torch.zeros_like(frame.x)
    for generation in range(4):
        direction = torch.stack([sign * angle.cos(), angle.sin()], dim=-1)
        normal = torch.stack([-direction[..., 1], direction[..., 0]], dim=-1)
        sway = (0.16 * (bend[:, :, generation, None] - 0.5) + 0.05 * torch.sin(7.0 * angle)) * length
        end = start + direction * length[..., None]
        middle = (start + end) / 2 + normal * sway[..., None]
        control = torch.stack([start, middle, end], dim=-2).reshape(-1, 3, 2)
        points = bezier(control, step).reshape(count, -1, 2)
        taper = radius * (1 - 0.35 * torch.linspace(0, 1, step)).repeat(points.shape[1] // step)
        drawn = torch.maximum(drawn, tubes(points, taper.expand(count, -1), frame))
        # Each vessel splits in two; the golden-ratio hash gives children fresh but reproducible angles.
        hashed = (angle * 61.803 + u[:, 40 + generation, None, None] * 7.0) % 1.0
        spread = 0.28 + 0.30 * hashed
        angle = torch.cat([angle - spread, angle + (0.62 - spread).clamp(min=0.15)], dim=2)
        start = torch.cat([end, end], dim=2)
        length = torch.cat([length, length], dim=2) * (0.80 + 0.10 * (hashed.repeat(1, 1, 2) - 0.5))
        radius *= 0.62
    return drawn


def stomach_gas(scene: Scene, frame: Frame, lungs: Lungs) -> Tensor:
    """Gas bubble of the stomach under the left dome, (N, H, W)."""
    u = scene.noise["stomach"]
    x0, width = 0.34 + 0.10 * (u[:, 0, None, None] - 0.5), _per(u[:, 1], 0.09, 0.16)
    below = frame.y - lungs.floor - 0.045
    shape = 1 - ((frame.x - x0) / width) ** 2 - ((below - 0.05) / 0.065) ** 2
    return 0.75 * shape.clamp(min=0).sqrt() * (u[:, 2, None, None] < 0.6)


def effusion_thickness(scene: Scene, frame: Frame, lungs: Lungs) -> Tensor:
    """Share of the lung's depth taken by fluid, (N, H, W) in [0, 1): a meniscus above the costophrenic angle."""
    u = scene.noise["effusion_level"]
    present = _by_side(frame, scene.effusion_sides[:, 0].float(), scene.effusion_sides[:, 1].float())
    height = _by_side(frame, 0.36 + 0.28 * u[:, 0], 0.36 + 0.28 * u[:, 1])
    full = _by_side(frame, 0.72 + 0.16 * u[:, 2], 0.72 + 0.16 * u[:, 3])
    lateral = (frame.x.abs() / lungs.outer.clamp(min=0.05)).clamp(0, 1)
    surface = lungs.angle_y - height * (0.70 + 0.45 * lateral**3)
    return present * full * _ramp((frame.y - surface) / 0.16).sqrt()


def device_attenuation(scene: Scene, frame: Frame) -> Tensor:
    """Attenuation (N, H, W) of all devices in the picture; kinds in the order of `labels.DEVICE_KINDS`."""
    total = torch.zeros_like(frame.x)
    for kind, draw in enumerate((pacemaker, venous_catheter, ecg_leads, endotracheal_tube)):
        rows = scene.device_kinds[:, kind].nonzero()[:, 0].tolist()
        if rows:
            shown = scene[rows]
            total[rows] = total[rows] + draw(shown.noise, Frame.of(shown, frame.size))
    return total


def pacemaker(noise: dict[str, Tensor], frame: Frame) -> Tensor:
    """Generator below a clavicle (left in four of five) and one lead through the SVC to the right ventricle."""
    u = noise["pacemaker"]
    side = torch.where(u[:, 0] < 0.8, 1.0, -1.0)
    x0, y0 = side * (0.47 + 0.12 * u[:, 1]), -0.40 + 0.10 * u[:, 2]
    angle = side * (0.35 * (u[:, 3] - 0.5))
    dx, dy = frame.x - x0[:, None, None], frame.y - y0[:, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = cos * dx + sin * dy, -sin * dx + cos * dy
    # A can of titanium: a rounded box, denser where the battery is, with a lighter header above.
    can = 1 - (along / 0.115).abs() ** 4 - ((across - 0.015) / 0.095).abs() ** 4
    header = 1 - (along / 0.075).abs() ** 4 - ((across + 0.095) / 0.035).abs() ** 4
    battery = (along.abs() < 0.08) & (across > 0.0) & (across < 0.085)
    box = 1.7 * can.clamp(min=0).pow(0.2) + 0.8 * battery * (can > 0) + 0.6 * header.clamp(min=0).pow(0.3) * (can <= 0)
    top = y0 - 0.10
    vein, apex, count = (-0.10 + 0.04 * side, -0.42), (0.13 + 0.08 * u[:, 5], 0.27 + 0.06 * u[:, 6]), 2 * frame.size
    upper = _curve(frame, count, (x0, top), (x0 - side * 0.10, top - 0.16), (side * 0.22, -0.60), vein)
    lower = _curve(frame, count, vein, (-0.15, -0.25), (-0.17, 0.10 + 0.05 * u[:, 4]), (-0.02, 0.30), apex)
    lead = torch.cat([upper, lower], dim=1)
    wire = METAL * tubes(lead, 0.0085, frame)
    tip = METAL * tubes(lead[:, -frame.size // 10 :], 0.013, frame)
    return torch.maximum(box, torch.maximum(wire, tip))


def venous_catheter(noise: dict[str, Tensor], frame: Frame) -> Tensor:
    """Central venous catheter from the right or left neck, or a subclavian puncture, to the SVC."""
    u = noise["catheter"]
    tip, count, route = (-0.105 + 0.02 * u[:, 1], -0.16 + 0.20 * u[:, 2]), 3 * frame.size, u[:, 5, None, None]
    neck = -0.22 + 0.06 * u[:, 3], -1.15
    jugular = _curve(frame, count, neck, (-0.20, -0.80), (-0.13, -0.62), (-0.115, -0.40), tip)
    puncture = -0.62, -0.42 + 0.1 * u[:, 4]
    subclavian = _curve(frame, count, puncture, (-0.48, -0.60), (-0.22, -0.62), (-0.11, -0.52), tip)
    left = _curve(frame, count, (0.24, -1.15), (0.22, -0.75), (0.10, -0.55), (-0.13, -0.52), tip)
    return 26.0 * tubes(torch.where(route < 0.5, jugular, torch.where(route < 0.8, subclavian, left)), 0.0115, frame)


def ecg_leads(noise: dict[str, Tensor], frame: Frame) -> Tensor:
    """Three electrodes (snap and pad) and the wires that leave the film."""
    u = noise["ecg"]
    total = torch.zeros_like(frame.x)
    anchors = ((-0.50, -0.42, -0.75, -1.2), (0.54, -0.46, 0.80, -1.2), (0.50, 0.42, 1.25, 0.15))
    for k, (x0, y0, x1, y1) in enumerate(anchors):
        ux, uy, ub, ue = (u[:, 4 * k + j] for j in range(4))
        x, y = x0 + 0.16 * (ux - 0.5), y0 + 0.16 * (uy - 0.5)
        bow = 0.22 * (ub - 0.5)
        near = x + 0.35 * (x1 - x) + bow, y + 0.2 * (y1 - y) - 0.10
        far = x + 0.75 * (x1 - x) - bow, y + 0.6 * (y1 - y)
        path = _curve(frame, 2 * frame.size, (x, y), near, far, (x1, y1 + 0.2 * (ue - 0.5)))
        wire = 45.0 * tubes(path, 0.0075, frame)
        radial = ((frame.x - x[:, None, None]) ** 2 + (frame.y - y[:, None, None]) ** 2).sqrt()
        pad = 0.16 * (radial < 0.050) + 1.5 * (radial < 0.020)
        total = torch.maximum(total, torch.maximum(wire, pad))
    return total


def endotracheal_tube(noise: dict[str, Tensor], frame: Frame) -> Tensor:
    """Tube in the trachea, its wall faint and its marker line dense, the tip above the carina."""
    u = noise["tube"]
    end = -0.36 - 0.14 * u[:, 1]
    line = _curve(frame, 2 * frame.size, (0.02 * (u[:, 0] - 0.5), -1.15), (0.01, -0.8), (0.012, end))
    edge = torch.tensor([0.026, 0.0])
    marker_line = METAL * 0.7 * tubes(line + edge, 0.0080, frame)
    wall = 14.0 * torch.maximum(tubes(line - edge, 0.0085, frame), tubes(line + edge, 0.0085, frame))
    return torch.maximum(marker_line, wall)


def point_spread(image: Tensor) -> Tensor:
    """Detector blur: a 3x3 binomial kernel per 256 pixels of width, compact by construction."""
    for _ in range(max(1, image.shape[-1] // 256)):
        wide = F.pad(image[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        rows = (wide[:, :-2] + wide[:, 2:]).mul_(0.25).add_(wide[:, 1:-1], alpha=0.5)
        image = (rows[..., :-2] + rows[..., 2:]).mul_(0.25).add_(rows[..., 1:-1], alpha=0.5)
    return image


def _blur_wide(image: Tensor) -> Tensor:
    """Blur by about an eighth of the image: the veil of scattered photons."""
    small = F.interpolate(image[:, None], size=(16, 16), mode="area")
    weights = torch.exp(-0.5 * (torch.arange(-4, 5) / 2.0) ** 2)
    weights = weights / weights.sum()
    small = F.conv2d(F.pad(small, (4, 4, 4, 4), mode="replicate"), weights.view(1, 1, 1, -1))
    small = F.conv2d(small, weights.view(1, 1, -1, 1))
    return F.interpolate(small, size=image.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def quantum_noise(scene: Scene, intensity: Tensor) -> Tensor:
    """Photon noise: standard deviation grows with the root of the intensity; one generator per patient."""
    generators = [torch.Generator().manual_seed(scene.seed * 1_000_003 + i) for i in scene.index]
    draws = [torch.randn(intensity.shape[1:], generator=generator) for generator in generators]
    level = 0.0016 + 0.0016 * scene.noise["exposure"][:, 2, None, None]
    return level * intensity.sqrt() * torch.stack(draws)


def film(scene: Scene, intensity: Tensor) -> Tensor:
    """Characteristic curve: gray in [0, 1] from log exposure, with the exposure and contrast of this film."""
    u = scene.noise["exposure"]
    density = -torch.log(intensity.clamp(min=1e-4))
    centre = 1.62 + 0.24 * (u[:, 0, None, None] - 0.5)
    slope = 2.1 + 0.5 * (u[:, 1, None, None] - 0.5)
    return torch.sigmoid(slope * (density - centre)).sub(0.02).div(0.96).clamp(0, 1)


@lru_cache(maxsize=16)
def _letters(left: bool, supine: bool, size: int) -> Tensor:
    """Dense points (P, 2) along the strokes of the side letter and of the view text below it."""
    view = [(letter, (0.065 * k, 0.175), 0.062) for k, letter in enumerate("AP" if supine else "PA")]
    letters = []
    for letter, origin, height in [("L" if left else "R", (0.0, 0.0), 0.13), *view]:
        strokes = []
        for (xa, ya), (xb, yb) in (line for stroke in _TABLES["glyphs"][letter] for line in itertools.pairwise(stroke)):
            t = torch.linspace(0, 1, max(2, int(math.hypot(xb - xa, yb - ya) * height * size)))[:, None]
            strokes.append(torch.tensor([[xa, ya]]) * (1 - t) + torch.tensor([[xb, yb]]) * t)
        letters.append(torch.cat(strokes) * height + torch.tensor(origin))
    return torch.cat(letters)


def marker(scene: Scene, size: int) -> Tensor:
    """Burnt-in side letter (L at the patient's left, or R) over AP or PA, gray (N, 1, size, size); never turned."""
    u, ap, images = scene.noise["marker"], scene.attributes["ap"], []
    for row in range(len(scene)):
        left = bool(u[row, 0] < 0.6)
        corner = torch.stack([0.80 + 0.06 * u[row, 1] if left else -0.93 + 0.06 * u[row, 1], -0.93 + 0.06 * u[row, 2]])
        pixels = (_letters(left, bool(ap[row] > 0.5), size) + corner + 1) / 2 * size - 0.5
        chord = stamp(pixels[None], torch.full((1, len(pixels)), 0.009 * size / 2), size)
        images.append((chord / (0.012 * size / 2)).clamp(0, 1) * (0.80 + 0.20 * u[row, 3]))
    return torch.stack(images)
