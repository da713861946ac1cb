"""Certificates, attacks, worst cases and corruptions."""
