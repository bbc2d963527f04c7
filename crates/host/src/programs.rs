//! Finds the programs that this one starts: the VMM and the lab.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::Access;

/// Says where the VMM is, before any other place.
pub const VMM_VARIABLE: &str = "ALVEOLE_VMM";
/// Says where the lab tool is, before any other place.
pub const LAB_VARIABLE: &str = "ALVEOLE_LAB_TOOL";
const VMM_NAME: &str = "alveole-vmm";
/// Says where the agent for guests is, before any other place.
pub const AGENT_VARIABLE: &str = "ALVEOLE_AGENT";
const AGENT_NAME: &str = "alveole-agent";
const LAB_NAME: &str = "tools/lab";

/// Why a program cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotFound {
    /// The environment names a file that cannot be run.
    #[error("cannot use {variable}={}: {why}; name an executable file, or unset it", path.display())]
    Named {
        /// The variable.
        variable: &'static str,
        /// Its value.
        path: PathBuf,
        /// What the file is instead.
        why: String,
    },
    /// No VMM.
    #[error(
        "cannot find alveole-vmm: it is neither in {} nor in PATH; build it there (cargo build), or say \
         where it is with {VMM_VARIABLE}",
        beside.display()
    )]
    Vmm {
        /// The directory of this program.
        beside: PathBuf,
    },
    /// No agent.
    #[error(
        "cannot find alveole-agent, which runs in guests: it is neither in {} nor in PATH; build it there (cargo build \
         --workspace), or say where it is with {AGENT_VARIABLE}",
        beside.display()
    )]
    Agent {
        /// The directory of this program.
        beside: PathBuf,
    },
    /// No lab.
    #[error(
        "cannot find the lab: there is no executable tools/lab in any directory above {} or {}; run this \
         from a checkout of Alveole, or say where it is with {LAB_VARIABLE}",
        exe.display(),
        cwd.display()
    )]
    Lab {
        /// The directory of this program.
        exe: PathBuf,
        /// The current directory.
        cwd: PathBuf,
    },
}

/// The VMM: named by `ALVEOLE_VMM`, else beside this program, else in `PATH`.
///
/// # Errors
/// It is at none of these places, or what the variable names cannot be run.
pub fn vmm() -> Result<PathBuf, NotFound> {
    program(VMM_VARIABLE, VMM_NAME, |beside| NotFound::Vmm { beside })
}

/// The agent that guests of images start with: named by `ALVEOLE_AGENT`, else beside this program, else in `PATH`.
///
/// # Errors
/// It is at none of these places, or what the variable names cannot be run.
pub fn agent() -> Result<PathBuf, NotFound> {
    program(AGENT_VARIABLE, AGENT_NAME, |beside| NotFound::Agent {
        beside,
    })
}

fn program(
    variable: &'static str,
    name: &str,
    missing: impl FnOnce(PathBuf) -> NotFound,
) -> Result<PathBuf, NotFound> {
    let beside = exe_dir();
    if let Some(path) = named(variable, env::var_os(variable))? {
        return Ok(path);
    }
    let candidate = beside.join(name);
    if runnable(&candidate).is_ok() {
        return Ok(candidate);
    }
    in_path(name).ok_or_else(|| missing(beside))
}

/// The lab tool: named by `ALVEOLE_LAB_TOOL`, else `tools/lab` in a directory above this program, else
/// in one above the current directory.
///
/// # Errors
/// It is at none of these places, or what the variable names cannot be run.
pub fn lab_tool() -> Result<PathBuf, NotFound> {
    if let Some(path) = named(LAB_VARIABLE, env::var_os(LAB_VARIABLE))? {
        return Ok(path);
    }
    let exe = exe_dir();
    let cwd = env::current_dir().unwrap_or_default();
    in_ancestors(&exe, LAB_NAME)
        .or_else(|| in_ancestors(&cwd, LAB_NAME))
        .ok_or(NotFound::Lab { exe, cwd })
}

/// The first executable `name` in the directories of `PATH`.
#[must_use]
pub fn in_path(name: &str) -> Option<PathBuf> {
    in_directories(name, &env::var_os("PATH")?)
}

fn in_directories(name: &str, path: &OsStr) -> Option<PathBuf> {
    env::split_paths(path)
        // An empty entry means the current directory, which is no place to take programs from.
        .filter(|directory| !directory.as_os_str().is_empty())
        .map(|directory| directory.join(name))
        .find(|candidate| runnable(candidate).is_ok())
}

fn in_ancestors(start: &Path, name: &str) -> Option<PathBuf> {
    start
        .ancestors()
        .map(|directory| directory.join(name))
        .find(|candidate| runnable(candidate).is_ok())
}

/// An empty variable counts as unset, as the shells have it.
fn named(variable: &'static str, value: Option<OsString>) -> Result<Option<PathBuf>, NotFound> {
    let Some(value) = value.filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let path = PathBuf::from(value);
    match runnable(&path) {
        // Absolute, because a bare name would be looked for in PATH when it is run.
        Ok(()) => Ok(Some(std::path::absolute(&path).unwrap_or(path))),
        Err(why) => Err(NotFound::Named {
            variable,
            path,
            why,
        }),
    }
}

fn runnable(path: &Path) -> Result<(), String> {
    let kind = path.metadata().map_err(|e| e.to_string())?;
    if !kind.is_file() {
        return Err("it is no regular file".into());
    }
    rustix::fs::access(path, Access::EXEC_OK)
        .map_err(|e| format!("it is not executable ({})", io::Error::from(e)))
}

fn exe_dir() -> PathBuf {
    env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(Path::to_path_buf))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn put(path: &Path, mode: u32) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn an_ancestor_is_searched_from_the_nearest() {
        let dir = tempfile::tempdir().unwrap();
        let start = dir.path().join("a/b/c");
        fs::create_dir_all(&start).unwrap();
        assert_eq!(in_ancestors(&start, "tools/no-such-lab"), None);
        put(&dir.path().join("tools/lab"), 0o755);
        assert_eq!(
            in_ancestors(&start, LAB_NAME),
            Some(dir.path().join("tools/lab"))
        );
        put(&dir.path().join("a/b/tools/lab"), 0o755);
        assert_eq!(
            in_ancestors(&start, LAB_NAME),
            Some(dir.path().join("a/b/tools/lab"))
        );
    }

    #[test]
    fn only_executable_files_count() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("1"), dir.path().join("2"));
        put(&first.join("vmm"), 0o644);
        put(&second.join("vmm"), 0o755);
        let path = env::join_paths([Path::new(""), &first, &second]).unwrap();
        assert_eq!(in_directories("vmm", &path), Some(second.join("vmm")));
        fs::create_dir(first.join("directory")).unwrap();
        assert_eq!(in_directories("directory", &path), None);
    }

    #[test]
    fn a_variable_that_names_nothing_runnable_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let value = |path: &Path| Some(path.as_os_str().to_owned());
        assert_eq!(named(VMM_VARIABLE, None), Ok(None));
        assert_eq!(named(VMM_VARIABLE, Some(OsString::new())), Ok(None));

        let plain = dir.path().join("plain");
        put(&plain, 0o644);
        let text = named(VMM_VARIABLE, value(&plain)).unwrap_err().to_string();
        assert!(
            text.contains("ALVEOLE_VMM=") && text.contains("plain"),
            "{text}"
        );
        assert!(text.contains("not executable"), "{text}");
        let text = named(LAB_VARIABLE, value(dir.path()))
            .unwrap_err()
            .to_string();
        assert!(text.contains("no regular file"), "{text}");
        let text = named(LAB_VARIABLE, value(&dir.path().join("gone")))
            .unwrap_err()
            .to_string();
        assert!(text.contains("No such file"), "{text}");
    }
}
