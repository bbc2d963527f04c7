//! The port to CPU virtualisation, and a scripted fake of it.
