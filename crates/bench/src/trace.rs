//! Reads what `strace` wrote: how long until the first guest instruction, and how many calls.
//!
//! Knows the output of `strace -f -ttt -o FILE` and of `strace -f -c -o FILE`, nothing of who was
//! traced.

/// What a trace of a VMM's `execve` and `ioctl` says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Trace {
    /// From its `execve` to its first `KVM_RUN`.
    pub(crate) first_run_ms: f64,
    /// `ioctl` calls before that.
    pub(crate) ioctls_before: u64,
}

/// Reads the lines of a trace, which may end anywhere after the first `KVM_RUN`.
///
/// # Errors
/// There is no `execve` or no `KVM_RUN` in it.
pub(crate) fn parse(text: &str) -> Result<Trace, String> {
    let mut start = None;
    let mut ioctls_before = 0;
    for line in text.lines() {
        // The second half of a call that another thread's line came between.
        if line.contains("<... ") {
            continue;
        }
        let Some((time, call)) = split_line(line) else {
            continue;
        };
        if call.starts_with("execve(") {
            start = start.or(Some(time));
        } else if call.starts_with("ioctl(") {
            if call.contains("KVM_RUN") {
                let start = start.ok_or("strace saw no execve")?;
                let first_run_ms = (time - start) as f64 / 1000.0;
                return Ok(Trace {
                    first_run_ms,
                    ioctls_before,
                });
            }
            ioctls_before += 1;
        }
    }
    Err("strace saw no KVM_RUN: the VMM never entered the guest".into())
}

/// `[PID] SECONDS.MICROSECONDS CALL`: the microseconds and the call.
fn split_line(line: &str) -> Option<(i64, &str)> {
    let mut rest = line.trim_start();
    for _ in 0..2 {
        let (word, after) = rest.split_once(' ')?;
        rest = after.trim_start();
        if let Some((seconds, micros)) = word.split_once('.') {
            let (seconds, micros): (i64, i64) = (seconds.parse().ok()?, micros.parse().ok()?);
            return Some((seconds * 1_000_000 + micros, rest));
        }
    }
    None
}

/// The number of calls of one name (`total` of all) in the summary that `strace -c` writes.
///
/// # Errors
/// There is no line of that name.
pub(crate) fn calls(text: &str, name: &str) -> Result<u64, String> {
    let line = text
        .lines()
        .find(|line| line.split_whitespace().last() == Some(name));
    let line = line.ok_or_else(|| format!("strace counted no {name}"))?;
    // % time, seconds, usecs/call (not in every version), calls, errors (if any), name.
    let header = text
        .lines()
        .find(|line| line.contains("calls"))
        .unwrap_or_default();
    let column = header
        .split_whitespace()
        .filter(|&word| word != "%")
        .position(|w| w == "calls");
    column
        .and_then(|column| line.split_whitespace().nth(column)?.parse().ok())
        .ok_or_else(|| format!("strace's line {line:?} is not understood"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace() {
        let text = r#"8050  1795470871.794262 execve("/x/firecracker", ["/x/firecracker"], 0x7fff /* 39 vars */) = 0
8050  1795470871.795550 ioctl(7, KVM_GET_API_VERSION, 0) = 12
8051  1795470871.799000 ioctl(3, TCGETS <unfinished ...>
8050  1795470871.799100 ioctl(7, KVM_CREATE_VM, 0) = 8
8051  1795470871.799200 <... ioctl resumed>, 0x7fffa7976b50) = -1 ENOTTY (Inappropriate ioctl)
8052  1795470872.018089 ioctl(12, KVM_RUN <unfinished ...>
8050  1795470872.018189 ioctl(9, KVM_IRQ_LINE, 0x7f) = 0
8052  1795470872.027204 <... ioctl resumed>, 0) = 0
8052  1795470872.127204 ioctl(12, KVM_RUN, 0) = -1 EINTR (Interrupted system call)
8052  1795470872.942997 +++ exited with 0 +++
8050  1795470872.942998 --- SIGCHLD {si_signo=SIGCHLD} ---
"#;
        let trace = parse(text).unwrap();
        assert_eq!(trace.ioctls_before, 3);
        assert!((trace.first_run_ms - 223.827).abs() < 1e-6, "{trace:?}");
    }

    #[test]
    fn traces_without_process_ids_and_without_a_guest() {
        let one = "1.000001 execve(\"/x\") = 0\n1.000501 ioctl(3, KVM_RUN, 0) = 0\n";
        assert_eq!(parse(one).unwrap().first_run_ms, 0.5);
        assert!(
            parse("1 1.000001 execve(\"/x\") = 0\n")
                .unwrap_err()
                .contains("KVM_RUN")
        );
        assert!(parse("").unwrap_err().contains("KVM_RUN"));
        assert!(
            parse("1.000501 ioctl(3, KVM_RUN")
                .unwrap_err()
                .contains("execve")
        );
    }

    #[test]
    fn totals() {
        let text = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 45.22    0.068148         177       385         4 ioctl
------ ----------- ----------- --------- --------- ----------------
100.00    0.150719         201       749         8 total
";
        assert_eq!(calls(text, "total"), Ok(749));
        assert_eq!(calls(text, "ioctl"), Ok(385));
        let old = "% time seconds calls errors syscall\n100.00 0.150719 312 total\n";
        assert_eq!(calls(old, "total"), Ok(312));
        assert!(calls("", "total").is_err());
    }
}
