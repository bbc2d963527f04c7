//! 16550 serial port and the consoles behind it.
