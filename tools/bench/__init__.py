"""Times ops, layers and whole networks beside their peers: `python -m tools.bench --help`."""
