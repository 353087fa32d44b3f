"""One synthetic head with a FLAIR lesion: the images and the masks of phantom.py.

The recipe: paint tissues over each other as soft-edged shapes bent by smooth noise, add a lesion,
and simulate a scanner (coil bias, gain, Rician noise). No FLAIR threshold finds the lesion,
because fat and sinus mucosa are as bright; place, shape and the other sequences tell them apart.
It is not a model of disease: use it to test code, not to judge a network.
"""

from collections.abc import Iterator, Sequence

import numpy as np

Array = np.ndarray
Signal = tuple[float, float, float]

MIN_SLICES, MIN_SIZE = 4, 32

# Signal of each tissue (pre-contrast, FLAIR, post-contrast), as a share of full scale.
FAT = (0.70, 0.74, 0.70)
BONE = (0.07, 0.06, 0.07)
AIR = (0.01, 0.01, 0.01)
CSF = (0.15, 0.08, 0.14)
WHITE = (0.39, 0.31, 0.41)
GREY = (0.28, 0.43, 0.31)
SINUS = (0.16, 0.12, 0.80)  # venous blood: a flow void that takes up contrast
CHOROID = (0.28, 0.48, 0.62)
MUCOSA = (0.24, 0.68, 0.55)  # of the paranasal sinuses
FLOW = (0.15, 0.52, 0.16)  # pulsation artefact of the cistern: CSF that looks bright on FLAIR
CAP = (0.36, 0.58, 0.38)  # periventricular cap: bright on FLAIR only
LESION = (0.23, 0.63, 0.25)
RIM = (0.25, 0.60, 0.55)  # of an enhancing lesion
BRAIN = (WHITE, GREY, CAP)  # where a lesion can grow


def make_volume(
    seed: int | Sequence[int], slices: int = 16, size: int = 96, lesion: bool = True
) -> tuple[Array, Array]:
    """Make a volume (slices, size, size, 3) uint8 and its mask (slices, size, size) bool.

    `lesion=False` gives the same head, healthy. Raises ValueError below 4 slices of 32 x 32.
    """
    if slices < MIN_SLICES or size < MIN_SIZE:
        raise ValueError(
            f"{slices} slices of {size} x {size} cannot show a brain; "
            f"take at least {MIN_SLICES} slices of {MIN_SIZE} x {MIN_SIZE}"
        )
    streams = np.random.SeedSequence(seed).spawn(3)  # so that no part's draws change another's
    head_rng, lesion_rng, scan_rng = (np.random.default_rng(stream) for stream in streams)
    head = head_coordinates(head_rng, slices, size)
    image, brain = paint_head(head_rng, head)
    share = _lesion_share(lesion_rng, head, brain) if lesion else np.zeros_like(brain)
    paint_lesion(lesion_rng, image, share)
    return scan(scan_rng, image), share > 0.5


def head_coordinates(rng: np.random.Generator, slices: int, size: int) -> Array:
    """Make (3, S, H, W): z up, y to the back, x to the side; the head is the unit ball."""
    centre = (np.arange(size) + 0.5) * 2 / size - 1
    z, y, x = np.meshgrid(np.linspace(-0.93, 0.93, slices), centre, centre, indexing="ij")
    tilt, dy, dx = rng.uniform(-0.12, 0.12), rng.uniform(-0.04, 0.04), rng.uniform(-0.04, 0.04)
    y, x = np.cos(tilt) * y - np.sin(tilt) * x + dy, np.sin(tilt) * y + np.cos(tilt) * x + dx
    return np.stack((z, y / rng.uniform(0.80, 0.90), x / rng.uniform(0.64, 0.72)))


def paint_head(rng: np.random.Generator, head: Array) -> tuple[Array, Array]:
    """Paint a healthy head without noise (S, H, W, 3) and its share of brain tissue (S, H, W)."""
    shape = head.shape[1:]
    image, brain = np.zeros(shape + (3,)), np.zeros(shape)
    for signal, level in _layers(rng, head):
        share = np.clip(0.5 - level * shape[1] / 5, 0, 1)  # an edge about two voxels wide
        image += share[..., None] * (np.asarray(signal) - image)
        brain += share * ((signal in BRAIN) - brain)
    return image, brain


def _layers(rng: np.random.Generator, head: Array) -> Iterator[tuple[Signal, Array]]:
    """Yield the tissues in painting order: the signal, and a level (S, H, W), below 0 inside."""
    z, y, x = head
    shape = z.shape
    # |z|^3 keeps the ring of scalp thin in most slices, and lets the first and last ones taper.
    radius = np.sqrt(x**2 + y**2 + np.abs(z) ** 3) + 0.012 * smooth_noise(rng, (4, 6, 6), shape)
    depth = 0.81 - radius  # below the surface of the brain
    sulcus = 0.05 * np.abs(smooth_noise(rng, (10, 26, 26), shape))  # distance to the next one
    bend = 0.015 * smooth_noise(rng, (4, 8, 8), shape)
    side = np.abs(x + bend)  # distance from the midline

    def pair(centre: Sequence[float], axes: Sequence[float]) -> Array:
        """Make the level of an ellipsoid (z, y, x) and its mirror image."""
        reach = [(at - c) / a for at, c, a in zip((z, y, side), centre, axes, strict=True)]
        return (np.linalg.norm(reach, axis=0) - 1) * min(axes) + bend

    fat = tuple(FAT * rng.uniform(0.85, 1.2, size=3))
    wide = rng.uniform(0.8, 1.4)  # ventricles
    cap = rng.uniform(0.05, 0.09)
    ribbon = np.minimum(depth - 0.04, np.maximum(sulcus - 0.026, depth - 0.30))

    yield fat, radius - 1
    scalp = rng.uniform(0.08, 0.11) - bend + 0.03 * y  # thicker at the back
    yield BONE, radius - 1 + scalp
    yield CSF, -depth - 0.03
    yield WHITE, -depth
    yield GREY, np.maximum(ribbon, -depth)
    yield CSF, np.maximum(sulcus - 0.006, np.abs(depth - 0.07) - 0.10)
    yield CSF, np.maximum.reduce((side - 0.012, -depth, np.minimum(depth - 0.35, 0.3 - z)))  # falx
    yield CSF, pair((-0.5, 0.03, 0.0), (0.25, 0.16, 0.17))  # cistern around the brain stem
    yield FLOW, pair((-0.45, -0.11, 0.05), (0.15, 0.05, 0.08))
    yield WHITE, pair((-0.6, 0.07, 0.0), (0.40, 0.13, 0.14))
    yield GREY, pair((0.02, 0.02, 0.28), (0.22, 0.26, 0.08))  # basal ganglia
    for horn in (-0.33, 0.36):
        yield CAP, pair((0.2, horn, 0.17), (0.20, cap, cap))
    curved = side - 0.25 * np.abs(y) ** 1.5 - 0.10
    level = np.sqrt(((z - 0.2) / 0.25) ** 2 + (y / 0.36) ** 2 + (curved / 0.055 / wide) ** 2) - 1
    yield CSF, 0.055 * wide * level + bend  # lateral ventricles
    yield CHOROID, pair((0.18, 0.20, 0.14), (0.12, 0.10, 0.025))
    yield SINUS, np.maximum.reduce((side - 0.04, np.abs(depth + 0.01) - 0.04, -0.3 - z, 0.1 - y))
    yield MUCOSA, np.maximum(pair((-0.75, -0.62, 0.0), (0.40, 0.24, 0.15)), radius - 0.93)
    yield AIR, pair((-0.75, -0.68, 0.0), (0.36, 0.22, 0.10))  # nasal cavity
    yield fat, np.maximum(pair((-0.55, -0.66, 0.36), (0.28, 0.26, 0.22)), radius - 1)  # orbits
    yield CSF, pair((-0.55, -0.76, 0.36), (0.15, 0.15, 0.13))  # eyeballs


def _lesion_share(rng: np.random.Generator, head: Array, brain: Array) -> Array:
    """Place a lesion of 1 to 4 % of the brain; return its share of each voxel (S, H, W)."""
    reach = np.full(brain.shape, np.inf)
    inner = (np.linalg.norm(head, axis=0) < 0.72) & (np.abs(head[2]) > 0.15)
    deep = np.argwhere(inner & (brain > 0.9))
    for _ in range(rng.choice((1, 2), p=(0.9, 0.1))):
        k, row, column = rng.choice(deep)
        centre = head[:, k, row, column]
        frame = np.linalg.qr(rng.standard_normal((3, 3)))[0]  # a random orientation
        offsets = np.tensordot(frame, head - centre[:, None, None, None], axes=1)
        offsets /= rng.uniform(0.7, 1.3, size=3)[:, None, None, None]
        reach = np.minimum(reach, np.linalg.norm(offsets, axis=0))
    reach *= np.exp(0.28 * smooth_noise(rng, (6, 11, 11), brain.shape))  # an irregular outline
    volume = np.exp(rng.uniform(np.log(0.01), np.log(0.04)))
    edge = np.quantile(reach[brain > 0.5], volume)
    return brain * (0.5 - 0.5 * np.tanh((reach / edge - 1) / 0.12))  # a soft edge


def paint_lesion(rng: np.random.Generator, image: Array, share: Array) -> None:
    """Blend a lesion into the image (S, H, W, 3), in place; one in three has an enhancing rim."""
    contrast = rng.uniform(0.75, 1.1)
    texture = 1 + 0.08 * smooth_noise(rng, (8, 16, 16), share.shape)[..., None]
    image += contrast * share[..., None] * (LESION * texture - image)
    if rng.random() < 1 / 3:
        rim = 4 * share * (1 - share)
        image += 0.6 * rim[..., None] * (np.asarray(RIM) - image)


def scan(rng: np.random.Generator, image: Array) -> Array:
    """Add coil bias, a gain per sequence and Rician noise; uint8."""
    shape = image.shape[:3]
    bias = np.exp(0.12 * smooth_noise(rng, (2, 3, 3), shape))[..., None]
    image = image * bias * rng.uniform(0.85, 1.1, size=3)
    real, imaginary = 0.015 * rng.standard_normal((2,) + image.shape)
    return (255 * np.hypot(image + real, imaginary)).clip(0, 255).astype(np.uint8)


def smooth_noise(rng: np.random.Generator, cells: Sequence[int], shape: Sequence[int]) -> Array:
    """Make noise of mean 0 and deviation 1, smooth over 1/`cells` of each side of `shape`."""
    # Gaussian bumps on a coarse grid are separable: three small matrix products make their sum.
    noise = rng.standard_normal(cells)
    for count, length in zip(cells, shape, strict=True):
        distance = np.linspace(0, count - 1, length)[:, None] - np.arange(count)  # in cells
        noise = np.tensordot(noise, np.exp(-((distance / 0.8) ** 2)), axes=(0, 1))  # axes rotate
    return (noise - noise.mean()) / noise.std()
