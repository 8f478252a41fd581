"""Versions of the service's database, one file for each, applied by :mod:`app.service.database`."""
