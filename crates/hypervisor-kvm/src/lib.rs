//! The port to CPU virtualisation on KVM.
