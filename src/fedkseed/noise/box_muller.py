"""The frozen constants of the `gaussian` family's Box-Muller transform (docs/noise.md, "Box-Muller in binary32").

They are part of what a seed means: changing one bit here changes every gaussian model ever published. Each was fitted
for the smallest largest error on its interval and rounded to binary32 one after the other, lowest power first.
"""

import numpy as np

f32 = np.float32

# log1p(x) = x - x^2/2 + x^3 (LOG[0] + LOG[1] x + ...), for x in [sqrt(1/2) - 1, sqrt(2) - 1]
LOG = tuple(
    f32(c)
    for c in (
        0.33333316445350647,
        -0.25000810623168945,
        0.20002304017543793,
        -0.16624560952186584,
        0.14180874824523926,
        -0.1312839835882187,
        0.1288338452577591,
        -0.07862460613250732,
    )
)
# sin(t) = t + t s (SIN[0] + SIN[1] s + ...) and cos(t) = 1 - s/2 + s^2 (COS[0] + COS[1] s + ...), s = t^2, |t| <= pi/4
SIN = tuple(f32(c) for c in (-0.1666666716337204, 0.008333380334079266, -0.00019853512640111148, 2.8375427518767538e-06))
COS = tuple(f32(c) for c in (0.04166664555668831, -0.00138873013202101, 2.443066841806285e-05))

# 2 ln 2 in two parts; the first has 12 significant bits, so that its product with an exponent (at most 24) is exact
TWO_LN2_HI = f32(1.38623046875)
TWO_LN2_LO = f32(6.389236659742892e-05)
ANGLE_STEP = f32(1.462918119976564e-09)  # 2 pi 2^-32
SQRT_HALF_MANTISSA = 0x3504F3
"""The 23 mantissa bits of sqrt(2) in binary32: larger mantissas are halved."""
