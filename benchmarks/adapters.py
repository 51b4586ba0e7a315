"""Packages that a user may have beside this one, each as a peer: where one cannot run, its row says why."""

from collections.abc import Mapping

from .peers import Peer

PEERS: Mapping[str, Peer] = {}
