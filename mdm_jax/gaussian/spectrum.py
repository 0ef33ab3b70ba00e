"""Radially averaged power spectra of pictures, and the noise levels at which frequencies sink."""

import numpy as np


def radial_spectrum(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(frequencies [F], power [F]) of pictures [N, H, W], without their mean picture.

    Frequencies are 1 to half of the shorter side, in cycles along it; power is the mean over
    pictures and over the modes nearest to the frequency. White noise of variance 1 has power 1 at
    all of them, so that noise of ``sigma / alpha`` is as strong as the data at
    ``logSNR = -log power``. ValueError for fewer than two pictures or sides below 2.
    """
    pictures = np.asarray(pictures, np.float64)
    if pictures.ndim != 3 or len(pictures) < 2 or min(pictures.shape[1:]) < 2:
        raise ValueError(
            "radial_spectrum needs at least two pictures [N, H, W] of sides of 2 or more, got "
            f"{pictures.shape}"
        )
    side = min(pictures.shape[1:])
    modes = np.fft.fft2(pictures - pictures.mean(0), norm="ortho")
    power = np.sum(np.abs(modes) ** 2, 0) / (len(pictures) - 1)  # the mean was theirs
    rows, columns = (np.fft.fftfreq(n) * side for n in pictures.shape[1:])
    ring = np.rint(np.hypot(rows[:, None], columns)).astype(int).ravel()
    total, count = np.bincount(ring, power.ravel()), np.bincount(ring)
    frequencies = np.arange(1, side // 2 + 1)
    return frequencies, total[frequencies] / count[frequencies]
