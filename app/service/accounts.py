"""Users, their passwords and tokens, and the sessions of browsers."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Final, Literal

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from sqlalchemy import delete, select

from app.errors import ConfigError
from app.service.database import Database
from app.service.tables import BrowserSession, Event, Job, Token, User

Role = Literal["user", "admin"]

#: Shortest password, in characters (NIST SP 800-63B asks for 8; 12 where it is the only factor).
LEAST_PASSWORD: Final = 12
#: Longest password; hashing a longer one would only cost time.
MOST_PASSWORD: Final = 256
#: How long a browser stays signed in, in seconds.
SESSION_SECONDS: Final = 12 * 3600.0
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_TOKEN: Final = re.compile(r"zns_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
#: How long a token that was verified by argon2 is recognised by its SHA-256, in seconds.
_KNOWN_SECONDS: Final = 300.0
_MOST_KNOWN: Final = 10_000


@dataclass(frozen=True, kw_only=True)
class Account:
    """Who sends a request."""

    id: int
    name: str
    role: Role
    csrf: str | None = None
    """The secret that forms of this session must repeat; None for a request with a token."""
    session: str | None = None
    """Id of the session."""

    @property
    def is_admin(self) -> bool:
        """Whether every user's jobs are visible."""
        return self.role == "admin"


@dataclass(kw_only=True)
class Accounts:
    """Users in the database."""

    database: Database
    secret: bytes
    """Key that signs cookies."""
    now: Callable[[], float] = time.time
    hasher: PasswordHasher = field(default_factory=PasswordHasher)
    _known: dict[bytes, tuple[str, float]] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)
    _nobody_hash: str = field(default="", repr=False)

    # ---- users

    def add(self, name: str, password: str, role: Role) -> None:
        """Add a user.

        Raises:
            ConfigError: the name is taken or has other characters than letters, digits and ``._@-``; or the password
                is too short.
        """
        if not is_user_name(name):
            raise ConfigError(f"user {name!r}: a name has up to 63 letters, digits and the characters . _ @ -")
        hashed = self._hashed(password)
        with self.database.writing() as session:
            if session.scalar(select(User).where(User.name == name)) is not None:
                raise ConfigError(f"user {name}: exists already. Choose another name, or change the password.")
            session.add(User(name=name, role=role, password=hashed, created=self.now()))
            session.add(Event(at=self.now(), user="command line", action="user added", what=name))

    def set_password(self, name: str, password: str) -> None:
        """Change a user's password and end the user's sessions.

        Raises:
            ConfigError: there is no such user, or the password is too short.
        """
        hashed = self._hashed(password)
        with self.database.writing() as session:
            user = _user(session.scalar(select(User).where(User.name == name)), name)
            user.password = hashed
            session.execute(delete(BrowserSession).where(BrowserSession.user_id == user.id))
            session.add(Event(at=self.now(), user="command line", action="password changed", what=name))

    def remove(self, name: str) -> None:
        """Remove a user with tokens and sessions.

        Raises:
            ConfigError: there is no such user, or the user has jobs.
        """
        with self.database.writing() as session:
            user = _user(session.scalar(select(User).where(User.name == name)), name)
            if session.scalar(select(Job.id).where(Job.user_id == user.id).limit(1)) is not None:
                raise ConfigError(f"user {name}: has jobs. Delete them first, or wait until they are deleted.")
            session.delete(user)
            session.add(Event(at=self.now(), user="command line", action="user removed", what=name))

    def listed(self) -> list[tuple[str, Role, int]]:
        """Return name, role and number of tokens of every user."""
        with self.database.reading() as session:
            users = session.scalars(select(User).order_by(User.name)).all()
            tokens = [token.user_id for token in session.scalars(select(Token))]
            return [(user.name, _role(user.role), tokens.count(user.id)) for user in users]

    def _hashed(self, password: str) -> str:
        if not LEAST_PASSWORD <= len(password) <= MOST_PASSWORD:
            raise ConfigError(
                f"the password has {len(password)} characters; it must have {LEAST_PASSWORD} to {MOST_PASSWORD}. "
                "Several words make a good one."
            )
        return self.hasher.hash(password)

    # ---- tokens

    def add_token(self, name: str) -> str:
        """Create a token of a user and return it; only its hash is stored.

        Raises:
            ConfigError: there is no such user.
        """
        public, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        with self.database.writing() as session:
            user = _user(session.scalar(select(User).where(User.name == name)), name)
            session.add(Token(id=public, user_id=user.id, secret=self.hasher.hash(secret), created=self.now()))
            session.add(Event(at=self.now(), user="command line", action="token added", what=public))
        return f"zns_{public}_{secret}"

    def revoke_token(self, public: str) -> None:
        """Remove a token, given by its public part or as a whole.

        Raises:
            ConfigError: there is no such token.
        """
        match = _TOKEN.fullmatch(public)
        wanted = match[1] if match else public.removeprefix("zns_")
        with self.database.writing() as session:
            token = session.get(Token, wanted)
            if token is None:
                raise ConfigError(f"token {wanted}: does not exist")
            session.delete(token)
            session.add(Event(at=self.now(), user="command line", action="token revoked", what=wanted))

    def by_token(self, text: str) -> Account | None:
        """Return who owns a token; None if it is not valid.

        Argon2 verifies a token when it is first seen, and then every five minutes. In between it is recognised by its
        SHA-256, which suffices for 256 random bits. The database is always asked whether the token still exists.
        """
        match = _TOKEN.fullmatch(text)
        if match is None:
            return None
        with self.database.reading() as session:
            token = session.get(Token, match[1])
            if token is None:
                return None
            if not self._is_known(text, token.secret) and not self._verified(token.secret, match[2]):
                return None
            self._remember(text, token.secret)
            return Account(id=token.user.id, name=token.user.name, role=_role(token.user.role))

    def _is_known(self, text: str, hashed: str) -> bool:
        with self._lock:
            known, until = self._known.get(_digest(text), ("", 0.0))
            return known == hashed and self.now() < until

    def _remember(self, text: str, hashed: str) -> None:
        with self._lock:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            if not (self._known.get(_digest(text), ("", 0.0))[1] > self.now()):
                self._known[_digest(text)] = (hashed, self.now() + _KNOWN_SECONDS)

    def _verified(self, hashed: str, given: str) -> bool:
        try:
            return self.hasher.verify(hashed, given)
        except (Argon2Error, InvalidHashError):
            return False

    # ---- sessions

    def sign_in(self, name: str, password: str) -> str | None:
        """Start a session and return the content of its cookie; None if name or password are wrong.

        An unknown name takes as long as a wrong password.
        """
        with self.database.reading() as session:
            user = session.scalar(select(User).where(User.name == name))
        hashed = user.password if user is not None and user.password else self._nobody()
        right = self._verified(hashed, password[: MOST_PASSWORD + 1]) and user is not None
        if not right or user is None:
            return None
        random = secrets.token_urlsafe(32)
        with self.database.writing() as session:
            session.execute(delete(BrowserSession).where(BrowserSession.expires < self.now()))
            session.add(
                BrowserSession(
                    id=_digest(random).hex(),
                    user_id=user.id,
                    csrf=secrets.token_urlsafe(32),
                    expires=self.now() + SESSION_SECONDS,
                )
            )
            session.add(Event(at=self.now(), user=user.name, action="signed in", what=""))
        return self.signed(random)

    def by_cookie(self, cookie: str) -> Account | None:
        """Return who is signed in with a cookie; None if its signature or the session is not valid."""
        random = self.unsigned(cookie)
        if random is None:
            return None
        with self.database.reading() as session:
            found = session.get(BrowserSession, _digest(random).hex())
            if found is None or found.expires < self.now():
                return None
            user = found.user
            return Account(id=user.id, name=user.name, role=_role(user.role), csrf=found.csrf, session=found.id)

    def sign_out(self, account: Account) -> None:
        """End a session."""
        with self.database.writing() as session:
            session.execute(delete(BrowserSession).where(BrowserSession.id == account.session))
            session.add(Event(at=self.now(), user=account.name, action="signed out", what=""))

    def signed(self, random: str) -> str:
        """Return random text with its signature."""
        return f"{random}.{hmac.new(self.secret, random.encode(), hashlib.sha256).hexdigest()}"

    def unsigned(self, cookie: str) -> str | None:
        """Return the text in front of a signature; None if the signature is wrong."""
        random, _, _ = cookie.partition(".")
        same = hmac.compare_digest(self.signed(random).encode(), cookie.encode())
        return random if random and same else None

    def _nobody(self) -> str:
        """Return a hash that no password has, made once."""
        with self._lock:
            if not self._nobody_hash:
                self._nobody_hash = self.hasher.hash(secrets.token_urlsafe(32))
            return self._nobody_hash


def is_user_name(text: str) -> bool:
    """Whether a text may be the name of a user."""
    return _NAME.fullmatch(text) is not None


def _user(found: User | None, name: str) -> User:
    if found is None:
        raise ConfigError(f"user {name}: does not exist. List the users: znormseg serve user list")
    return found


def _role(text: str) -> Role:
    return "admin" if text == "admin" else "user"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
