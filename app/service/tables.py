"""Tables of the service's database. Times are seconds since 1970, UTC."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

#: SQLite counts rows itself only in a column of exactly the type INTEGER.
_Number = BigInteger().with_variant(Integer, "sqlite")


class Table(DeclarativeBase):
    """Base of all tables."""


class User(Table):
    """A person or a program that may use the service."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(_Number, primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(8))
    """``user`` or ``admin``."""
    password: Mapped[str] = mapped_column(String(200))
    """Argon2 hash; empty if the user has only tokens."""
    created: Mapped[float] = mapped_column(Float)


class Token(Table):
    """A token of the API."""

    __tablename__ = "tokens"
    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    """Public part of the token, by which it is found and revoked."""
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    secret: Mapped[str] = mapped_column(String(200))
    """Argon2 hash of the secret part."""
    created: Mapped[float] = mapped_column(Float)
    user: Mapped[User] = relationship()


class BrowserSession(Table):
    """A browser that has signed in."""

    __tablename__ = "sessions"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """SHA-256 of the cookie's random part."""
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    csrf: Mapped[str] = mapped_column(String(64))
    expires: Mapped[float] = mapped_column(Float, index=True)
    user: Mapped[User] = relationship()


class Upload(Table):
    """Files that a user sends, and what was recognised in them."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    created: Mapped[float] = mapped_column(Float, index=True)
    state: Mapped[str] = mapped_column(String(12))
    """``receiving``, ``checking``, ``ready`` or ``refused``."""
    files: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """Name, size and contrast of each file, as the user stated them."""
    cases: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """What :mod:`app.service.intake` recognised."""
    message: Mapped[str] = mapped_column(String)
    """Why the upload was refused."""
    deleted: Mapped[bool] = mapped_column(Boolean, default=False)


class Job(Table):
    """One case to predict."""

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    case_number: Mapped[int] = mapped_column(Integer)
    """Number of the case in the upload, from 0."""
    name: Mapped[str] = mapped_column(String)
    """Name of the case, from the names of its files; may contain a patient's name."""
    model: Mapped[str] = mapped_column(String(64))
    options: Mapped[dict[str, Any]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(String(10))
    """``queued``, ``running``, ``done``, ``failed`` or ``cancelled``."""
    priority: Mapped[int] = mapped_column(Integer)
    """-1 low, 0 normal, 1 high."""
    place: Mapped[int] = mapped_column(BigInteger)
    """Order in the queue among jobs of one priority."""
    change: Mapped[int] = mapped_column(BigInteger, unique=True)
    """Number of its last change; numbers rise over all jobs."""
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    stopping: Mapped[bool] = mapped_column(Boolean, default=False)
    """Whether it was cancelled while running."""
    deleted: Mapped[bool] = mapped_column(Boolean, default=False)
    created: Mapped[float] = mapped_column(Float)
    started: Mapped[float | None] = mapped_column(Float)
    ended: Mapped[float | None] = mapped_column(Float, index=True)
    step: Mapped[str] = mapped_column(String, default="")
    """What its worker does now, or why it waits."""
    message: Mapped[str] = mapped_column(String, default="")
    """Why it failed."""
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """Volumes, flags, seconds and files."""
    __table_args__ = (Index("jobs_in_order", "state", "priority", "place"),)


class Submission(Table):
    """What a request with an idempotency key created."""

    __tablename__ = "submissions"
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(128), primary_key=True)
    request: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the request."""
    made: Mapped[list[str]] = mapped_column(JSON)
    """Ids of what was created."""
    created: Mapped[float] = mapped_column(Float, index=True)


class Event(Table):
    """An entry of the log of who did what; no names of cases or files."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(_Number, primary_key=True)
    at: Mapped[float] = mapped_column(Float, index=True)
    user: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(32))
    what: Mapped[str] = mapped_column(String(64))
    """Id of a job, an upload or a token, or a user's name."""


class Counter(Table):
    """Numbers that rise: ``change`` and ``place``."""

    __tablename__ = "counters"
    name: Mapped[str] = mapped_column(String(16), primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)
