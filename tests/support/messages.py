"""Names and numbers for messages."""

from hypothesis import strategies as st

from fedkseed.errors import ProtocolError
from fedkseed.federation.envelope import check_name


def is_name(text: str) -> bool:
    try:
        check_name(text)
    except ProtocolError:
        return False
    return True


SHORT = 400  # characters of an error message: it goes into a log, once for each refused reply
NAMES = (
    st.text(st.one_of(st.just(" "), st.characters(categories=["L", "M", "N", "P", "S"])), min_size=1, max_size=64)
    .map(lambda text: text.encode()[:64].decode(errors="ignore"))
    .filter(is_name)
)
POSITIVE = st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False)
EPS = st.floats(1e-37, 1e37)
