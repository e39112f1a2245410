"""The cryptography that secure sums are made of, none of it ours; the only module that imports it.

Key agreement X25519 with HKDF-SHA256, authenticated encryption ChaCha20-Poly1305, keystreams of ChaCha20 (`cryptography`), and
Shamir's secret sharing over GF(2^128) (`pycryptodome`). Every derived key is used once: for one message, or one keystream.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError

SEED_BYTES, KEY_BYTES, SIGNATURE_BYTES = 16, 32, 96
"""Of a secret that is shared; of a public or derived key; of an ECDSA signature on P-384."""
MAX_CURVE_BITS = 384


def derived(secret: bytes, purpose: bytes) -> bytes:
    """A key of 32 bytes for one purpose."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=b"fedkseed secure sum " + purpose).derive(secret)


class KeyPair:
    """An X25519 key, made of a seed.

    Args:
        seed: 16 random bytes; whoever has them has the key.
    """

    def __init__(self, seed: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(derived(seed, b"key pair"))
        self.public = self._private.public_key().public_bytes_raw()

    def agree(self, public: bytes, purpose: bytes) -> bytes:
        """The key that this one and another share for a purpose, 32 bytes.

        Raises:
            ProtocolError: the other is no public key that a secret can be shared with.
        """
        try:
            return derived(self._private.exchange(X25519PublicKey.from_public_bytes(public)), purpose)
        except ValueError as error:
            raise ProtocolError("a public key is of low order or of another length; expected one of X25519") from error


class NodeKey:
    """A node's ECDSA key on P-256 or P-384, the one that Flower knows the node by.

    Args:
        private: the key.

    Raises:
        ValueError: it is on another curve.
    """

    def __init__(self, private: ec.EllipticCurvePrivateKey) -> None:
        if private.curve.key_size > MAX_CURVE_BITS:
            raise ValueError(
                f"a key on {private.curve.name}; expected one on P-256 or P-384, as ssh-keygen -t ecdsa -b 384 makes"
            )
        self._private = private

    @classmethod
    def read(cls, data: bytes) -> NodeKey:
        """The key of a file as ssh-keygen or openssl makes it.

        Raises:
            ValueError: it is none, or has a password.
        """
        try:
            load = serialization.load_ssh_private_key if b"OPENSSH" in data else serialization.load_pem_private_key
            private = load(data, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ValueError("no private key without a password; expected an ECDSA key, as ssh-keygen makes") from error
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ValueError("a key of another kind; expected an ECDSA key, as ssh-keygen -t ecdsa -b 384 makes")
        return cls(private)

    def sign(self, data: bytes) -> bytes:
        """A signature, 96 bytes."""
        r, s = decode_dss_signature(self._private.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(SIGNATURE_BYTES // 2, "big") + s.to_bytes(SIGNATURE_BYTES // 2, "big")


def verify(public: bytes, data: bytes, signature: bytes) -> bool:
    """Whether bytes were signed by the private key to a public one, in OpenSSH's form."""
    half = SIGNATURE_BYTES // 2
    try:
        key = serialization.load_ssh_public_key(public)
        if not isinstance(key, ec.EllipticCurvePublicKey) or len(signature) != SIGNATURE_BYTES:
            return False
        r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        return False
    return True


def check_public(key: bytes) -> None:
    """Refuse a public key that no secret can be shared with.

    Raises:
        ProtocolError: it is of low order.
    """
    KeyPair(bytes(SEED_BYTES)).agree(key, b"a look")


def commitment(seed: bytes) -> bytes:
    """What tells a seed from any other, and nothing else of it."""
    return derived(seed, b"commitment")


def seal(key: bytes, message: bytes, about: bytes) -> bytes:
    """A message that only the holder of this key reads, bound to what it is about; a key seals one message."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), message, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """A sealed message.

    Raises:
        ProtocolError: it was sealed with another key, or is about something else, or was changed.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, about)
    except InvalidTag as error:
        raise ProtocolError("a sealed share was changed, or is of another round, client or roster") from error


def keystream(key: bytes, count: int) -> NDArray[np.uint32]:
    """So many numbers, uniform on uint32, of a key of 32 bytes."""
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * count))
    return np.frombuffer(stream, "<u4").astype(np.uint32)


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """So many shares of a secret of 16 bytes, of which `threshold` give it back and fewer say nothing."""
    return [share for _, share in Shamir.split(threshold, count, secret, False)]


def combine(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The secret of as many shares as the threshold says, each with its position from 0."""
    return Shamir.combine([(position + 1, share) for position, share in shares], False)
