"""Devices rendered into any frontal chest film; the film itself is the exact counterfactual without them.

Attenuation a and a share of scatter s make gray' = 1 - (1 - gray) (s + (1 - s) exp(-a)); places are those of `canvas`.
"""

import math
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prism_lib.language.labels import DEVICE_KINDS
from prism_lib.phantom.anatomy import point_spread
from prism_lib.phantom.canvas import STEP, Anchors, Canvas, Dice, Points, beside, exposed, film_contrast, spline


def _striped(canvas: Canvas, path: Points, width: float, wall: float, stripe: float, gap: float, side: float) -> None:
    """A plastic tube with a radiopaque stripe, interrupted by the side hole ``gap`` mm from the tip."""
    canvas.line(path, width, wall, hollow=0.72)
    line = beside(path, side * width / 2 * canvas.mm)
    canvas.line(canvas.near_end(line, gap + 5, 1e5), max(1.0, width / 7), stripe)
    canvas.line(canvas.near_end(line, 0, gap), max(1.0, width / 7), stripe)


def _vein(dice: Dice, side: int, tip: tuple[float, float], entry: str) -> list[tuple[float, float]]:
    """Places from a jugular, subclavian or arm vein of a side (-1: the patient's right) to the tip near the heart."""
    if entry == "jugular":
        out = dice.uniform(0.28, 0.50)
        start = [(side * out, -0.55), (side * (0.15 + 0.4 * out), -0.22)] if dice.chance(0.5) else []
        start = start or [(side * dice.uniform(0.40, 0.60), -0.30), (side * dice.uniform(0.26, 0.33), -0.20)]
    elif entry == "subclavian":
        start = [(side * dice.uniform(0.75, 0.95), dice.uniform(0.02, 0.16)), (side * 0.52, -0.02)]
    else:  # along the arm, which leaves the picture
        arm = dice.uniform(1.30, 1.55)
        start = [(side * (arm + 0.45), dice.uniform(0.7, 1.3)), (side * arm, dice.uniform(0.30, 0.45))]
        start += [(side * dice.uniform(1.0, 1.15), dice.uniform(0.04, 0.14)), (side * 0.55, -0.02)]
    inner = [(side * 0.24, 0.04), (-0.10, 0.17)] if side > 0 else [(-0.20, 0.07)]
    return [*start, *inner, (-0.165, 0.27), tip]


def _pacemaker(dice: Dice, body: Anchors, canvas: Canvas) -> None:
    """Pacemaker or defibrillator below a clavicle (left in four of five) with one to three leads."""
    side, shock = (1 if dice.chance(0.8) else -1), dice.chance(0.4)
    place = side * dice.uniform(0.62, 0.88), dice.uniform(0.05, 0.22)
    centre, angle = body.at(place)[0], side * dice.uniform(-0.5, 0.3)
    half = dice.uniform(22, 25) * (1.25 if shock else 1.0), dice.uniform(18, 23) * (1.2 if shock else 1.0)
    power = dice.uniform(2.2, 3.6)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]) * canvas.mm

    def inside(x: float, y: float) -> Points:
        return centre + np.array([x * half[0], y * half[1]]) @ turn

    canvas.shape(centre, half, 1.5, angle, power)
    canvas.shape(centre, half, 0.7, angle, power, rim=1.2)
    battery = inside(dice.uniform(-0.2, 0.2), 0.42)
    canvas.shape(battery, (0.66 * half[0], 0.40 * half[1]), dice.uniform(0.3, 0.9), angle, 3.5)
    for _ in range(dice.between(2, 5)):  # parts of the circuit
        spot = inside(dice.uniform(-0.55, 0.55), dice.uniform(-0.5, 0.0))
        canvas.shape(spot, (dice.uniform(1.5, 6), dice.uniform(1.5, 4)), dice.uniform(0.3, 1.0), angle, 6.0)
    header = inside(-0.1 * side, -1.08)
    canvas.shape(header, (0.62 * half[0], 6.5), 0.35, angle, 4.0)
    routes = [[(-0.20, 0.62), (-0.02, 0.90), (dice.uniform(0.34, 0.50), dice.uniform(0.86, 0.98))]]
    routes += [[(-0.19, 0.58), (-0.12, 0.68), (-0.03, dice.uniform(0.50, 0.58))]] if dice.chance(0.6) else []
    routes += [[(-0.16, 0.66), (0.10, 0.66), (0.46, 0.56), (0.58, 0.76)]] if dice.chance(0.25) else []
    strength = dice.uniform(0.7, 1.2)
    for k, route in enumerate(routes):
        socket = header + np.array([-side * (6 - 5 * k), -2.0 + 3 * k]) @ turn
        canvas.shape(socket, (3.5, 1.6), 1.2, angle, 4.0)
        # Spare lead lies in a coil behind the can before it enters the vein.
        turns = np.linspace(0, dice.uniform(0.3, 1.8) * math.pi, 6) if dice.chance(0.7) else np.zeros(0)
        coil = [inside(-side * 1.15 * math.cos(t), 1.2 * math.sin(t - 0.6)) for t in turns]
        vein = [(side * (0.42 - 0.02 * k), -0.01 + 0.02 * k), (side * 0.22, 0.05 + 0.02 * k)]
        vein += [(-0.03, 0.14), (-0.15, 0.26)] if side > 0 else [(-0.16, 0.18)]
        course = body.at(*(dice.near(spot, 0.02) for spot in (*vein, *route)))
        path = spline(np.concatenate([socket[None], np.reshape(coil, (-1, 2)), course]))
        canvas.line(path, 2.0, strength)
        parts = [(0, 3, 2.6, 1.6), (12, 15, 2.6, 1.6)]
        if shock and k == 0:
            parts += [(20, 68, 3.6, 2.0), (150, 215, 3.6, 2.0)][: 1 + dice.chance(0.5)]
        for start, stop, width, dense in parts:
            canvas.line(canvas.near_end(path, start, stop), width, dense)


def _central_line(dice: Dice, body: Anchors, canvas: Canvas) -> None:
    """Jugular, subclavian or arm (PICC) catheter to the superior vena cava; hub and lumens outside the neck."""
    side = -1 if dice.chance(0.65) else 1
    entry = ("jugular", "jugular", "subclavian", "arm")[dice.between(0, 3)]
    tip = dice.uniform(-0.20, -0.13), dice.uniform(0.34, 0.58)
    dialysis = entry == "jugular" and dice.chance(0.25)
    width = 4.4 if dialysis else 1.7 if entry == "arm" else 2.4
    path, strength = spline(body.at(*_vein(dice, side, tip, entry))), dice.uniform(0.22, 0.70)
    canvas.line(path, width, strength, hollow=0.45)
    if dialysis:
        canvas.line(path, 0.8, 0.5 * strength)
    lumens = 0 if entry == "arm" or dice.chance(0.3) else dice.between(1, 3)
    hub = path[0] + np.array([side * 6.0, 3.0]) * canvas.mm
    canvas.stroke(hub, 0.3 * side, [[(-6, 0), (6, 0)]], 5.0, 0.35 * (lumens > 0))
    for k in range(lumens):
        end = hub + np.array([side * dice.uniform(60, 120), dice.uniform(-60, 80) + 20 * k]) * canvas.mm
        middle = (hub + end) / 2 + np.array([0.0, dice.uniform(-15, 15)]) * canvas.mm
        canvas.line(spline([hub, middle, end]), 2.2, 0.18, hollow=0.5)
        canvas.stroke(end, dice.uniform(0, 3), [[(-8, 0), (8, 0)]], 6.0, 0.25)


# Discs of a grabber, a snap (stud in a ring), a lobed ring and a radiolucent pad: radius, strength, rim.
_DISCS = (((2, 1.2, 0),), ((5.5, 0.45, 0), (2.2, 1.1, 0), (5.5, 0.8, 1)), ((4.5, 1.0, 1.2),), ((4, 0.25, 0),))


def _connector(dice: Dice, canvas: Canvas, at: Points, angle: float, style: int) -> None:
    """What joins a cable to its electrode: snap, ring, clip with a spring, or a pad that hardly shows."""
    if dice.chance(0.6):
        canvas.shape(at, (dice.uniform(14, 20), dice.uniform(13, 17)), dice.uniform(0.03, 0.10), angle, 2.6)
    if style == 0:  # grabber: a frame of wire round a spring
        large, wide = dice.uniform(1.0, 1.4), dice.uniform(3.5, 6)
        frame = [(-14, -2.5), (2, -wide), (6, 0), (2, wide), (-14, 2.5)]
        canvas.stroke(at, angle, [[(x * large, y) for x, y in frame]], 1.3, 0.9)
        canvas.stroke(at, angle, [[(-12, 0), (4, 0)], [(-4, -3), (-4, 3)], [(2, -wide), (2, wide)]], 1.0, 0.8)
    elif style == 2:  # lobed ring
        for t in np.linspace(0, 2 * math.pi, 7)[:-1]:
            canvas.shape(at + np.array([math.cos(t), math.sin(t)]) * 4.5 * canvas.mm, (2.0, 2.0), 0.9)
    elif style == 3:  # a radiolucent electrode leaves the crimped end of the wire
        canvas.stroke(at, angle, [[(-3, 0), (3, 0)]], 2.0, 0.9)
    for radius, strength, rim in _DISCS[style]:
        canvas.shape(at, (radius, radius), strength, rim=rim)
    canvas.stroke(at, angle, [[(-26, 0), (-12, 0)]], dice.uniform(3.0, 4.2), dice.uniform(0.25, 0.6))


_LEADS = ((-0.80, 0.00), (0.80, -0.02), (0.90, 1.02), (-0.90, 1.05), (0.25, 0.78), (-0.15, 0.45), (0.62, 0.85))


def _ecg(dice: Dice, body: Anchors, canvas: Canvas) -> None:
    """One to six cables from electrodes across the chest to one or two places where they leave the picture."""
    size, mm, far = body.size, canvas.mm, body.size + 12.0
    exits = [dice.uniform(0, 1) for _ in range(2)]
    style, width = dice.between(0, 3), dice.uniform(2.0, 3.0)
    strength, core, double = dice.uniform(0.16, 0.45), dice.uniform(0.0, 0.35), dice.chance(0.2)
    for k in range(dice.between(1, 6)):
        end = body.at(dice.near(_LEADS[k if dice.chance(0.7) else dice.between(0, 6)], 0.20))[0]
        way = (exits[0] if dice.chance(0.7) else exits[1]) + dice.uniform(-0.03, 0.03)
        edges = [(-12.0, (0.02 + 1.8 * way) * size), ((way - 0.4) * 6.6 * size, -12.0)]  # left and upper
        edges += [((way - 0.55) * 5 * size, far), (far, (way - 0.75) * 4 * size)]  # lower and right
        out = np.array(edges[bisect((0.4, 0.55, 0.75), way)])
        if dice.chance(0.15):  # a cable that only passes
            end = np.array([far if out[0] < size / 2 else -12.0, dice.uniform(0.1, 1.0) * size])
        run = end - out
        normal = np.array([-run[1], run[0]]) * (1 if run[0] > 0 else -1)
        sag = (dice.uniform(-0.10, 0.30), dice.uniform(-0.10, 0.32))
        knots = [out, out + 0.35 * run + sag[0] * normal, out + 0.72 * run + sag[1] * normal]
        if dice.chance(0.12):
            radius, phase = dice.uniform(18, 55) * mm, math.atan2(run[1], run[0]) - math.pi / 2
            turn = phase + np.linspace(0.5, 2 * math.pi + 0.3, 8)
            oval = radius * np.array([dice.uniform(0.6, 1.3), dice.uniform(0.6, 1.3)])
            knots[1:2] = [knots[1] + (1 + 0.04 * j) * oval * (math.cos(t), math.sin(t)) for j, t in enumerate(turn)]
        elif dice.chance(0.35):  # slack
            bend = dice.uniform(0.12, 0.30) * (1 if dice.chance(0.5) else -1) * normal
            knots = [out, out + 0.22 * run + bend, out + 0.50 * run - 0.7 * bend, out + 0.78 * run + sag[1] * normal]
        path = spline([*knots, end])
        for shift in (-0.75, 0.75) if double else (0.0,):
            strand = beside(path, shift * width * mm)
            canvas.line(strand, width, strength)
            canvas.line(strand, 1.0, core)
        tangent = path[-1] - path[max(0, len(path) - int(10 * mm / STEP) - 1)]
        _connector(dice, canvas, end, math.atan2(tangent[1], tangent[0]), style)


def _airway_tube(dice: Dice, body: Anchors, canvas: Canvas) -> None:
    """Endotracheal tube with its marker line, or a tracheostomy tube with flange and connector."""
    lean, side = dice.uniform(-0.03, 0.03), (1 if dice.chance(0.5) else -1)
    width, wall, tip = dice.uniform(9.5, 12), dice.uniform(0.16, 0.34), (lean + 0.01, dice.uniform(0.10, 0.30))
    if dice.chance(0.3):  # tracheostomy
        top = body.at((lean + dice.uniform(-0.05, 0.05), dice.uniform(-0.22, -0.10)))[0]
        bend = top + np.array([side * dice.uniform(0, 12), 14.0]) * canvas.mm
        path = spline([top, bend, body.at((lean, tip[1] - 0.08))[0]])
        canvas.line(path, width, 1.6 * wall, hollow=0.75)
        canvas.shape(top, (8.5, 8.5), 0.55, rim=2.2)
        canvas.shape(top, (32, 7), 0.10, dice.uniform(-0.15, 0.15), 4.0)
        return
    path = spline(body.at((lean + side * dice.uniform(0.0, 0.16), -0.75), (lean, -0.22), (lean, 0.0), tip))
    canvas.line(path, width, wall, hollow=0.74)
    canvas.line(beside(path, side * 0.42 * width * canvas.mm), 1.3, dice.uniform(0.35, 0.85))
    if dice.chance(0.3):  # line to the cuff's balloon
        canvas.line(beside(path, -side * dice.uniform(9, 16) * canvas.mm)[: len(path) // 2], 1.8, 0.15)


def _gastric_tube(dice: Dice, body: Anchors, canvas: Canvas) -> None:
    """Nasogastric tube along the oesophagus into the stomach, or a thin feeding tube with a weighted tip."""
    u = dice.uniform(-0.02, 0.06)
    tip = dice.uniform(0.30, 0.62), dice.uniform(1.12, 1.32)
    places = [(u, -0.7), (u - 0.03, -0.1), (u, 0.35), (u + 0.04, 0.75), (0.13, 0.98), (0.28, tip[1] - 0.06), tip]
    path = spline(body.at(*places))
    if dice.chance(0.25):
        canvas.line(path, 3.0, dice.uniform(0.35, 0.6), hollow=0.4)
        canvas.line(canvas.near_end(path, 0, 22), 4.2, 1.4)
        return
    _striped(canvas, path, dice.uniform(4.5, 6), dice.uniform(0.10, 0.26), dice.uniform(0.3, 0.8), 90, 0.0)


def _chest_drain(dice: Dice, body: Anchors, canvas: Canvas) -> None:
    """Drain through the lateral wall to apex or base: a stripe with a gap at the last side hole, or a thin pigtail."""
    side, up = (1 if dice.chance(0.5) else -1), dice.chance(0.65)
    entry = side * dice.uniform(1.02, 1.12), dice.uniform(0.50, 0.85)
    tip = (side * dice.uniform(0.35, 0.6), dice.uniform(0.05, 0.3)) if up else (side * 0.3, dice.uniform(0.7, 1.0))
    way = (side * dice.uniform(0.78, 0.92), (0.55 * entry[1] + 0.45 * tip[1]) if up else entry[1] + 0.02)
    out = [(side * 1.9, entry[1] + dice.uniform(0.2, 0.9)), (side * 1.35, entry[1] + dice.uniform(0.12, 0.3))]
    knots = body.at(*out, entry, way, tip)
    if dice.chance(0.2):  # pigtail
        turns = np.linspace(0, 1.7 * math.pi, 8)
        curl = np.stack([-side * np.sin(turns), np.cos(turns) - 1], axis=1) * dice.uniform(8, 14) * canvas.mm
        path = spline(np.concatenate([knots, knots[-1] + curl[1:]]))
        canvas.line(path, dice.uniform(3.2, 4.5), dice.uniform(0.25, 0.6), hollow=0.6)
        return
    path, width, wall = spline(knots), dice.uniform(6, 10), dice.uniform(0.08, 0.2)
    _striped(canvas, path, width, wall, dice.uniform(0.5, 1.1), dice.uniform(30, 70), dice.uniform(-0.6, 0.6))


def _sternum(dice: Dice, body: Anchors, canvas: Canvas) -> None:
    """A column of twisted wire loops; with them, at times, clips of a bypass and a valve's ring."""
    lean, count, strength = dice.uniform(-0.04, 0.04), dice.between(4, 8), dice.uniform(0.6, 1.2)
    flat = dice.chance(0.6)  # wire round the bone, twisted in the middle; else small loops with a tail
    for k in range(count):
        centre = body.at(dice.near((lean, 0.12 + 0.64 * k / (count - 1)), 0.02))[0]
        wide = dice.uniform(9, 14) if flat else dice.uniform(5, 8)
        tall, tilt = dice.uniform(1.5, 4.5), dice.uniform(-0.3, 0.3)
        ends = np.linspace(-1.4, 2 * math.pi - dice.uniform(1.5, 2.4), 14)
        canvas.stroke(centre, tilt, [[(wide * math.cos(t), tall * math.sin(t)) for t in ends]], 0.8, strength)
        start, knot = (0.0 if flat else wide), dice.uniform(0.6, 2.4) if flat else dice.uniform(-0.4, 0.4)
        tail = (start, 0), (start + 5 * math.cos(knot), 5 * math.sin(knot))
        canvas.stroke(centre, tilt, [tail], 1.4, 1.2 * strength)
    for _ in range(dice.between(3, 10) if dice.chance(0.5) else 0):
        clip = body.at((dice.uniform(0.02, 0.38), dice.uniform(0.25, 0.85)))[0]
        canvas.stroke(clip, dice.uniform(0, math.pi), [[(-2.5, -0.6), (2.5, 0.6)]], 1.2, 1.6)
    if dice.chance(0.3):
        valve, angle = body.at((dice.uniform(0.02, 0.20), dice.uniform(0.62, 0.74)))[0], dice.uniform(-0.9, 0.6)
        canvas.shape(valve, (dice.uniform(12, 15), dice.uniform(5, 13)), 1.5, angle, rim=dice.uniform(0.9, 2.0))


def _port(dice: Dice, body: Anchors, canvas: Canvas) -> None:
    """Port below a clavicle: round or three-cornered chamber, catheter over the clavicle to the vena cava."""
    side = -1 if dice.chance(0.7) else 1
    place = side * dice.uniform(0.48, 0.68), dice.uniform(0.16, 0.30)
    centre, strength = body.at(place)[0], dice.uniform(0.5, 1.2)
    if dice.chance(0.35):
        corners = [centre + 8 * canvas.mm * np.array([math.sin(t), -math.cos(t)]) for t in (0, 2.1, 4.2)]
        for corner in corners:
            canvas.shape(corner, (5, 5), 0.25 * strength)
        canvas.line(spline([*corners, corners[0]], smooth=False), 3.0, 0.4 * strength)
    else:
        canvas.shape(centre, (13, 13), 0.45 * strength)
    canvas.shape(centre, (dice.uniform(10, 12.5),) * 2, 1.1 * strength, rim=2.0)
    canvas.shape(centre, (7, 7), 0.7 * strength)
    tip = dice.uniform(-0.20, -0.14), dice.uniform(0.36, 0.56)
    start = [(place[0] - side * 0.06, place[1] - 0.06), (side * 0.40, 0.0), (side * 0.32, -0.07), (side * 0.26, -0.05)]
    path = spline(body.at(*start, *_vein(dice, side, tip, "jugular")[2:]))
    canvas.line(path, 2.3, dice.uniform(0.4, 0.8), hollow=0.4)


def _oxygen(dice: Dice, body: Anchors, canvas: Canvas) -> None:
    """Oxygen tubing from both sides of the neck to a slide, then out of the picture; or one wide tube."""
    strength, lean = dice.uniform(0.08, 0.2), dice.uniform(-0.3, 0.3)
    join = (lean, dice.uniform(0.0, 0.4))
    below = [(lean + dice.uniform(-0.3, 0.3), join[1] + 0.4), (dice.uniform(-1.6, 1.6), 1.7)]
    if dice.chance(0.25):
        wide = dice.uniform(14, 22)
        path = spline(body.at((dice.uniform(-0.4, 0.4), -0.8), dice.near((1.2 * np.sign(lean), 0.1), 0.2), below[1]))
        canvas.line(path, wide, 0.7 * strength, hollow=0.86)
        return
    for side in (-1, 1):
        canvas.line(spline(body.at((side * 0.42, -0.6), (side * 0.28 + lean, -0.15), join)), 3.6, strength, hollow=0.6)
    canvas.stroke(body.at(join)[0], math.pi / 2, [[(-5, 0), (5, 0)]], 6.0, 1.2 * strength)
    canvas.line(spline(body.at(join, *below)), 5.5, strength, hollow=0.65)


def _clothes(dice: Dice, body: Anchors, canvas: Canvas) -> None:
    """Buttons or snaps of a gown, or a necklace with or without a pendant."""
    if dice.chance(0.55):
        radius, lean, strength = dice.uniform(4, 7), dice.uniform(-0.15, 0.15), dice.uniform(0.15, 0.7)
        shoulder = dice.chance(0.5)
        for k in range(dice.between(2, 5)):
            on_shoulder = (-1) ** k * dice.uniform(0.6, 1.0), -0.12 + 0.08 * (k // 2)
            place = on_shoulder if shoulder else (lean, 0.05 + 0.25 * k)
            centre = body.at(dice.near(place, 0.02))[0]
            canvas.shape(centre, (radius, radius), strength)
            canvas.shape(centre, (radius, radius), strength, rim=1.2)
            if shoulder:
                canvas.shape(centre, (1.8, 1.8), 2 * strength)
            else:
                for hole in (-1.6, 1.6):
                    canvas.shape(centre + np.array([hole, 0.4]) * canvas.mm, (1.0, 1.0), -1.2 * strength)
        canvas.map.clamp_(min=0)
        return
    low, wide, pitch = dice.uniform(0.02, 0.32), dice.uniform(0.26, 0.4), dice.uniform(1.8, 4.5)
    lowest = dice.uniform(-0.03, 0.03), low
    path = spline(body.at((-wide, -0.45), (-0.8 * wide, -0.12), lowest, (0.8 * wide, -0.12), (wide, -0.45)))
    canvas.line(path, 0.7, 0.4)
    canvas.line(path[:: max(1, int(pitch * canvas.mm / STEP))], 0.55 * pitch, dice.uniform(0.8, 1.5))
    if dice.chance(0.6):
        pendant = path[int(np.argmax(path[:, 1]))] + np.array([0.0, 8.0]) * canvas.mm
        if dice.chance(0.5):
            canvas.stroke(pendant, 0.0, [[(0, -8), (0, 10)], [(-5, -2), (5, -2)]], 2.0, 1.6)
        else:
            canvas.shape(pendant, (dice.uniform(4, 8), dice.uniform(6, 9)), 1.4)


# Kind: how often it is in a film, and what draws it.
CATALOGUE: dict[str, tuple[float, Callable[[Dice, Anchors, Canvas], None]]] = {
    DEVICE_KINDS[0]: (0.20, _pacemaker),
    DEVICE_KINDS[1]: (0.30, _central_line),
    DEVICE_KINDS[2]: (0.60, _ecg),
    DEVICE_KINDS[3]: (0.25, _airway_tube),
    "nasogastric tube": (0.25, _gastric_tube),
    "chest drain": (0.14, _chest_drain),
    "sternal wires": (0.15, _sternum),
    "port": (0.10, _port),
    "oxygen tubing": (0.14, _oxygen),
    "buttons and necklace": (0.12, _clothes),
}
KINDS: tuple[str, ...] = tuple(CATALOGUE)  # in the order of mask channels and columns


@dataclass(frozen=True)
class Rendered:
    """Films with devices."""

    images: Tensor  # (N, 1, H, W) in [0, 1] on 8-bit gray levels, equal to the film where the mask is False
    mask: Tensor  # bool (N, 1, H, W): pixels that the devices change
    kinds: tuple[tuple[str, ...], ...]  # of each film: what can be seen, in the order of `KINDS`


def with_devices(films: Tensor, seeds: Sequence[int], kinds: Sequence[str] = KINDS) -> Rendered:
    """Render devices of ``kinds`` into films (N, 1, H, H), bright where dense; a seed and a kind decide its look."""
    if films.ndim != 4 or films.shape[1] != 1 or films.shape[2] != films.shape[3] or films.shape[3] < 128:
        raise ValueError(f"films must be (N, 1, H, H) with H of 128 pixels or more; got {tuple(films.shape)}")
    if len(seeds) != len(films):
        raise ValueError(f"need one seed a film; got {len(seeds)} seeds for {len(films)} films")
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be one or more of {', '.join(KINDS)}; got {list(kinds)}")
    levels = films * 255
    if not films.is_floating_point() or not bool(((levels - levels.round().clamp(0, 255)).abs() < 1e-3).all()):
        found = f"{films.dtype}, {films.min():g} to {films.max():g}"
        raise ValueError(f"films must be floating point in [0, 1] of 8-bit levels, multiples of 1/255; got {found}")
    images, drawn = films.clone(), []
    for image, film, seed in zip(images[:, 0], films[:, 0], seeds, strict=True):
        body = Anchors.of(film)
        dice = {kind: Dice(seed, k) for k, kind in enumerate(KINDS) if kind in kinds}
        rank = {kind: d.uniform(0, 1) / CATALOGUE[kind][0] for kind, d in dice.items()}  # below 1: drawn
        attenuation, seen = torch.zeros_like(film), list[str]()
        tone = math.exp(Dice(seed, len(KINDS) + 1).uniform(math.log(0.5), math.log(1.7)))
        contrast, field = film_contrast(film, body) * tone, exposed(film)
        for kind, d in dice.items():
            if rank[kind] < 1 or rank[kind] == min(rank.values()):
                canvas = Canvas(body, contrast * d.uniform(0.8, 1.25))
                CATALOGUE[kind][1](d, body, canvas)
                shown = canvas.map * field
                if ((1 - film) * shown.clamp(max=1)).max() > 0.02:  # it changes the film visibly
                    seen.append(kind)
                attenuation += shown
        scatter = Dice(seed, len(KINDS)).uniform(0.10, 0.20)
        gray = 1 - (1 - film) * (scatter + (1 - scatter) * torch.exp(-point_spread(attenuation[None])[0]))
        image.copy_(torch.where((gray * 255).round() == (film * 255).round(), film, (gray * 255).round() / 255))
        drawn.append(tuple(seen))
    return Rendered(images, images != films, tuple(drawn))
