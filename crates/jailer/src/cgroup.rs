//! Cgroups of both versions: where they will be, and making them.
//!
//! Sources: Linux Documentation/admin-guide/cgroup-v1/ and cgroup-v2.rst.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::cli::{Args, CgroupSetting, CgroupVersion};
use crate::failure::{Failure, OrFail};
use crate::undo::Undo;

/// Where the mounts of this process are listed.
const MOUNTS: &str = "/proc/self/mounts";
/// Which processes are in a cgroup. Zero, written, stands for the writer.
const PROCS: &str = "cgroup.procs";
/// What a cgroup of version 2 has to give, and what it gives to those below.
const CONTROLLERS: &str = "cgroup.controllers";
const SUBTREE: &str = "cgroup.subtree_control";

/// What is to be done about cgroups.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Nothing.
    Stay,
    /// The program goes into a cgroup that exists, if it exists.
    Join(PathBuf),
    /// The program gets a cgroup of its own in each of these hierarchies.
    Make(Vec<Group>),
}

/// A cgroup to make.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Group {
    version: CgroupVersion,
    /// Where the hierarchy is mounted.
    root: PathBuf,
    /// Below that: the parents' names, then its own.
    path: Vec<String>,
    settings: Vec<CgroupSetting>,
}

/// A hierarchy, from the table of mounts.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    version: CgroupVersion,
    dir: PathBuf,
    /// Those of version 1; version 2 says them in a file.
    controllers: Vec<String>,
}

/// Says what is to be done. `read` reads a file of the host.
///
/// # Errors
/// A hierarchy or a controller is missing; or the host's files cannot be read.
pub(crate) fn plan(
    args: &Args,
    program_name: &OsStr,
    read: &dyn Fn(&Path) -> io::Result<String>,
) -> Result<Plan, Failure> {
    let v2 = args.cgroup_version == CgroupVersion::V2;
    if args.cgroups.is_empty() && !v2 {
        return Ok(Plan::Stay);
    }
    let parent = match &args.parent_cgroup {
        Some(parent) => parent.clone(),
        None => program_name.to_string_lossy().into_owned(),
    };
    let table =
        read(Path::new(MOUNTS)).or_fail(|| format!("read {MOUNTS}"), "mount proc on /proc")?;
    let hierarchies = hierarchies(&table);
    let path: Vec<String> = parent
        .split('/')
        .chain([&*args.id])
        .map(str::to_owned)
        .collect();
    if !v2 {
        return plan_v1(&args.cgroups, &path, &hierarchies).map(Plan::Make);
    }
    let Some(root) = hierarchies.iter().find(|h| h.version == CgroupVersion::V2) else {
        // Nothing was asked for that needs one.
        if args.cgroups.is_empty() && args.parent_cgroup.is_none() {
            return Ok(Plan::Stay);
        }
        return Err(Failure::new(
            "use --cgroup-version 2",
            "no cgroup2 file system is mounted",
            "mount -t cgroup2 none /sys/fs/cgroup, or give --cgroup-version 1",
        ));
    };
    if args.cgroups.is_empty() {
        return Ok(Plan::Join(root.dir.join(parent)));
    }
    let file = root.dir.join(CONTROLLERS);
    let there = read(&file).or_fail(|| format!("read {file:?}"), "is cgroup2 mounted there?")?;
    for setting in &args.cgroups {
        let controller = setting.controller();
        if !there.split_whitespace().any(|c| c == controller) {
            let v1 = hierarchies.iter().find(|h| h.has(controller));
            let cure = match v1 {
                Some(v1) => format!(
                    "cgroup v1 has it at {:?}: give --cgroup-version 1, or boot the host with cgroup_no_v1={controller}",
                    v1.dir
                ),
                None => "check the name, and that the host's kernel has it and was not booted with cgroup_disable=".into(),
            };
            return Err(missing(setting, &root.dir, there.split_whitespace(), cure));
        }
    }
    Ok(Plan::Make(vec![Group {
        version: CgroupVersion::V2,
        root: root.dir.clone(),
        path,
        settings: args.cgroups.clone(),
    }]))
}

fn plan_v1(
    settings: &[CgroupSetting],
    path: &[String],
    hierarchies: &[Hierarchy],
) -> Result<Vec<Group>, Failure> {
    let mut groups: Vec<Group> = Vec::new();
    let v1 = || {
        hierarchies
            .iter()
            .filter(|h| h.version == CgroupVersion::V1)
    };
    for setting in settings {
        let Some(hierarchy) = v1().find(|h| h.has(setting.controller())) else {
            let cure = if hierarchies.iter().any(|h| h.version == CgroupVersion::V2) {
                format!(
                    "give --cgroup-version 2 (files have other names there), or mount -t cgroup -o {} it",
                    setting.controller()
                )
            } else {
                format!("mount -t cgroup -o {} it", setting.controller())
            };
            let there = v1().flat_map(|h| h.controllers.iter().map(String::as_str));
            return Err(missing(setting, Path::new("cgroup v1"), there, cure));
        };
        match groups.iter_mut().find(|g| g.root == hierarchy.dir) {
            Some(group) => group.settings.push(setting.clone()),
            None => groups.push(Group {
                version: CgroupVersion::V1,
                root: hierarchy.dir.clone(),
                path: path.to_vec(),
                settings: vec![setting.clone()],
            }),
        }
    }
    Ok(groups)
}

/// Words among a mount's options that are no controllers.
const NO_CONTROLLERS: [&str; 12] = [
    "rw",
    "ro",
    "nosuid",
    "nodev",
    "noexec",
    "relatime",
    "noatime",
    "nodiratime",
    "sync",
    "seclabel",
    "xattr",
    "clone_children",
];

fn missing<'a>(
    setting: &CgroupSetting,
    place: &Path,
    there: impl Iterator<Item = &'a str>,
    cure: String,
) -> Failure {
    let there: Vec<_> = there.collect();
    let there = if there.is_empty() {
        "none".into()
    } else {
        there.join(", ")
    };
    Failure::new(
        format!("set --cgroup {}={}", setting.file, setting.value),
        format!(
            "controller {:?} is missing; {} has: {there}",
            setting.controller(),
            place.display()
        ),
        cure,
    )
}

impl Hierarchy {
    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|c| c == controller)
    }
}

/// The hierarchies in a table of mounts (proc_pid_mounts(5)).
fn hierarchies(table: &str) -> Vec<Hierarchy> {
    let of = |line: &str| {
        let mut words = line.split(' ');
        let (dir, kind, options) = (words.nth(1)?, words.next()?, words.next()?);
        let version = match kind {
            "cgroup" => CgroupVersion::V1,
            "cgroup2" => CgroupVersion::V2,
            _ => return None,
        };
        let is_controller = |word: &&str| {
            version == CgroupVersion::V1 && !NO_CONTROLLERS.contains(word) && !word.contains('=')
        };
        Some(Hierarchy {
            version,
            dir: unescape(dir).into(),
            controllers: options
                .split(',')
                .filter(is_controller)
                .map(str::to_owned)
                .collect(),
        })
    };
    table.lines().filter_map(of).collect()
}

/// Blanks and the like are written as a backslash and three octal digits there.
fn unescape(word: &str) -> String {
    let mut out = String::new();
    let mut rest = word;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let digits = rest.get(at + 1..at + 4);
        match digits.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out + rest
}

/// Makes the cgroups and sets their files. Gives the files that take the program in, when it writes to them.
///
/// # Errors
/// What the kernel does not take. What was made is in `undo`.
pub(crate) fn make(plan: &Plan, undo: &mut Undo) -> Result<Vec<Entrance>, Failure> {
    match plan {
        Plan::Stay => Ok(Vec::new()),
        Plan::Join(dir) if !dir.is_dir() => Ok(Vec::new()),
        Plan::Join(dir) => Ok(vec![Entrance::open(dir, None)?]),
        Plan::Make(groups) => groups.iter().map(|group| group.make(undo)).collect(),
    }
}

/// A cgroup's file that takes processes in.
#[derive(Debug)]
pub(crate) struct Entrance {
    dir: PathBuf,
    procs: File,
    /// That of another cgroup, to leave this one by if it is to be removed again.
    way_out: Option<File>,
}

impl Entrance {
    fn open(dir: &Path, way_out: Option<&Path>) -> Result<Self, Failure> {
        let open = |dir: &Path| {
            let procs = dir.join(PROCS);
            File::options().write(true).open(&procs).or_fail(
                || format!("open {procs:?}"),
                "run the jailer as root; is the cgroup file system mounted read-only?",
            )
        };
        Ok(Self {
            dir: dir.to_owned(),
            procs: open(dir)?,
            way_out: way_out.map(open).transpose()?,
        })
    }

    /// Moves the calling process to the hierarchy's root, before it ends: nothing is lost if that fails.
    pub(crate) fn leave(&self) {
        if let Some(mut way_out) = self.way_out.as_ref() {
            let _ = way_out.write_all(b"0");
        }
    }

    /// Moves the calling process in.
    pub(crate) fn enter(&self) -> Result<(), Failure> {
        (&self.procs).write_all(b"0").map_err(|e| {
            let cure = match e.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::BUSY) => "it gives controllers to cgroups below it, so it cannot have processes itself: give --cgroup, so that one is made below it, or another --parent-cgroup",
                Some(Errno::NOSPC) => "give it processors and memory: --cgroup cpuset.cpus=... and --cgroup cpuset.mems=...",
                Some(Errno::OPNOTSUPP) => "it is threaded or below a threaded one: give another --parent-cgroup",
                _ => "may its limits be too low?",
            };
            Failure::new(format!("move into cgroup {:?}", self.dir), e, cure)
        })
    }
}

impl Group {
    fn make(&self, undo: &mut Undo) -> Result<Entrance, Failure> {
        let mut dir = self.root.clone();
        for name in &self.path {
            if self.version == CgroupVersion::V2 {
                self.give_controllers(&dir)?;
            }
            let parent = dir.clone();
            dir.push(name);
            make_level(&parent, name, &dir, undo)?;
            if self.version == CgroupVersion::V1
                && self.settings.iter().any(|s| s.controller() == "cpuset")
            {
                inherit_cpuset(&parent, &dir)?;
            }
        }
        for setting in &self.settings {
            let file = dir.join(&setting.file);
            write(&file, &setting.value).or_fail(
                || format!("write {:?} to {file:?}", setting.value),
                "check the file's name and what it takes: Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst of Linux",
            )?;
        }
        Entrance::open(&dir, Some(&self.root))
    }

    /// Has the cgroup `dir` give the controllers that are asked for to those below it.
    fn give_controllers(&self, dir: &Path) -> Result<(), Failure> {
        let file = dir.join(SUBTREE);
        for setting in &self.settings {
            let controller = setting.controller();
            let given = fs::read_to_string(&file).or_fail(
                || format!("read {file:?}"),
                "is this a cgroup of version 2?",
            )?;
            if given.split_whitespace().any(|c| c == controller) {
                continue;
            }
            write(&file, &format!("+{controller}")).map_err(|e| {
                let cure = match e.raw_os_error().map(Errno::from_raw_os_error) {
                    Some(Errno::BUSY) => "it has processes, and may then not give controllers to cgroups below it: move them into one below it, or give another --parent-cgroup",
                    Some(Errno::NOENT) => "it has not got the controller itself: give another --parent-cgroup",
                    _ => "run the jailer as root; is the cgroup file system mounted read-only?",
                };
                Failure::new(format!("give controller {controller} to cgroups below {dir:?}"), e, cure)
            })?;
        }
        Ok(())
    }
}

fn make_level(parent: &Path, name: &str, dir: &Path, undo: &mut Undo) -> Result<(), Failure> {
    let act = || format!("make cgroup {dir:?}");
    match fs::create_dir(dir) {
        Ok(()) => {
            let parent = File::open(parent).or_fail(act, "is the host well?")?;
            undo.folder(parent, OsStr::new(name), dir)
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(Failure::new(
            act(),
            e,
            "run the jailer as root; is the cgroup file system mounted read-only, or full (cgroup.max.descendants)?",
        )),
    }
}

/// A new cpuset of version 1 has neither processors nor memory, and takes no process: it gets its parent's.
fn inherit_cpuset(parent: &Path, dir: &Path) -> Result<(), Failure> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let file = dir.join(name);
        let act = || format!("fill {file:?} from its parent");
        let cure = "does the parent have processors and memory?";
        if !fs::read_to_string(&file)
            .or_fail(act, cure)?
            .trim()
            .is_empty()
        {
            continue;
        }
        let value = fs::read_to_string(parent.join(name)).or_fail(act, cure)?;
        write(&file, value.trim()).or_fail(act, cure)?;
    }
    Ok(())
}

/// One write call, as these files want it; the file must be there.
fn write(file: &Path, value: &str) -> io::Result<()> {
    let mut file = File::options().write(true).open(file)?;
    let written = file.write(value.as_bytes())?;
    if written < value.len() {
        return Err(io::Error::other(format!("only {written} bytes were taken")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::cli::{Request, parse};

    const V1: &str = "\
tmpfs /sys/fs/cgroup tmpfs rw,relatime,mode=755 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,nodev,noexec,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/cpuset cgroup rw,relatime,cpuset 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,name=systemd 0 0
";
    const V2: &str = "cgroup2 /sys/fs/cg\\040roup cgroup2 rw,nosuid,nsdelegate 0 0\n";

    fn planned(words: &str, mounts: &str, controllers: &str) -> Result<Plan, String> {
        let line = format!("--id vm --exec-file /bin/vmm --uid 1 --gid 1 {words}");
        let Request::Run(args) = parse(line.split_whitespace().map(OsString::from)).unwrap() else {
            panic!("{words}")
        };
        let read = |path: &Path| match path.to_str() {
            Some(MOUNTS) => Ok(mounts.to_owned()),
            Some(p) if p.ends_with("/cgroup.controllers") => Ok(controllers.to_owned()),
            _ => Err(io::Error::from(io::ErrorKind::NotFound)),
        };
        plan(&args, OsStr::new("vmm"), &read).map_err(|e| e.to_string())
    }

    fn made(plan: Result<Plan, String>) -> Vec<Group> {
        match plan.unwrap() {
            Plan::Make(groups) => groups,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn v1_has_a_group_in_each_hierarchy() {
        let words = "--cgroup cpu.shares=2 --cgroup cpuset.cpus=0 --cgroup cpuacct.usage=0";
        let groups = made(planned(words, V1, ""));
        let of: Vec<_> = groups
            .iter()
            .map(|g| (g.root.to_str().unwrap(), g.settings.len()))
            .collect();
        assert_eq!(
            of,
            [
                ("/sys/fs/cgroup/cpu,cpuacct", 2),
                ("/sys/fs/cgroup/cpuset", 1)
            ]
        );
        assert_eq!(groups[0].path, ["vmm", "vm"]);
        let groups = made(planned(&format!("{words} --parent-cgroup a/b"), V1, ""));
        assert_eq!(groups[1].path, ["a", "b", "vm"]);
    }

    #[test]
    fn v2_has_one_group() {
        let words = "--cgroup-version 2 --cgroup cpu.weight=50 --cgroup memory.max=1000000000";
        let groups = made(planned(words, &format!("{V1}{V2}"), "cpu memory pids"));
        assert_eq!(groups.len(), 1);
        assert_eq!(groups[0].root, PathBuf::from("/sys/fs/cg roup"));
        assert_eq!(groups[0].settings.len(), 2);
    }

    #[test]
    fn without_settings_version_2_joins_what_there_is() {
        assert_eq!(planned("", V1, "").unwrap(), Plan::Stay);
        assert_eq!(planned("--parent-cgroup a", V1, "").unwrap(), Plan::Stay);
        let join = |dir: &str| Plan::Join(Path::new("/sys/fs/cg roup").join(dir));
        assert_eq!(planned("--cgroup-version 2", V2, "").unwrap(), join("vmm"));
        assert_eq!(
            planned("--cgroup-version 2 --parent-cgroup a/b", V2, "").unwrap(),
            join("a/b")
        );
        assert_eq!(planned("--cgroup-version 2", V1, "").unwrap(), Plan::Stay);
    }

    #[test]
    fn what_is_missing_is_named_with_the_cure() {
        let both = format!("{V1}{V2}");
        for (words, mounts, controllers, want) in [
            (
                "--cgroup memory.limit_in_bytes=5",
                V1,
                "",
                &[
                    "\"memory\" is missing",
                    "cpu, cpuacct, cpuset",
                    "mount -t cgroup -o memory",
                ][..],
            ),
            (
                "--cgroup memory.limit_in_bytes=5",
                &both,
                "memory",
                &["give --cgroup-version 2"],
            ),
            ("--cgroup systemd.x=5", V1, "", &["\"systemd\" is missing"]),
            (
                "--cgroup rw.x=5",
                "",
                "",
                &["\"rw\" is missing", "has: none"],
            ),
            (
                "--cgroup-version 2 --cgroup cpu.max=5",
                &both,
                "",
                &[
                    "\"cpu\" is missing",
                    "has: none",
                    "cpu,cpuacct",
                    "--cgroup-version 1",
                ],
            ),
            (
                "--cgroup-version 2 --cgroup gpu.max=5",
                V2,
                "cpu io",
                &["\"gpu\" is missing", "has: cpu, io", "check the name"],
            ),
            (
                "--cgroup-version 2 --cgroup cpu.max=5",
                V1,
                "",
                &["no cgroup2 file system is mounted", "mount -t cgroup2"],
            ),
            (
                "--cgroup-version 2 --parent-cgroup a",
                "",
                "",
                &["no cgroup2 file system is mounted"],
            ),
        ] {
            let said = planned(words, mounts, controllers).unwrap_err();
            for word in want {
                assert!(said.contains(word), "{words}: {said}");
            }
        }
    }

    #[test]
    fn tables_of_mounts() {
        for (table, dirs) in [
            ("", &[][..]),
            ("cgroup\ncgroup /a\ncgroup /a cgroup\n", &[]),
            ("none /a\\134b\\011c cgroup2 rw 0 0", &["/a\\b\tc"]),
            (
                "none /a\\ cgroup2 rw 0 0\nnone /\\9 cgroup rw",
                &["/a\\", "/\\9"],
            ),
        ] {
            let found = hierarchies(table);
            let found: Vec<_> = found.iter().map(|h| h.dir.to_str().unwrap()).collect();
            assert_eq!(found, dirs, "{table}");
        }
    }
}
