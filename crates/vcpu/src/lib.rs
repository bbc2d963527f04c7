//! One vCPU thread and its state machine.
