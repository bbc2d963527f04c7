//! Small fixed hardware: power, reset, boot timer, panic port.
