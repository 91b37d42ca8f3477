"""Simulates one layer over several processes, sockets and hosts, and checks it where it can."""
