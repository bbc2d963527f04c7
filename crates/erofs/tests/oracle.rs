//! Others read what is written: `fsck.erofs`, the kernel of this machine, and our own reader.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use alveole_erofs::{
    Child, Content, Directory, Image, Info, Inode, Kind, Metadata, WriteError, Writer,
};
use proptest::prelude::*;

/// Says loudly that a test cannot run here, and has it counted.
fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let log = File::options().create(true).append(true).open(path);
        log.and_then(|mut log| log.write_all(line.as_bytes()))
            .unwrap();
    }
}

fn metadata(mode: u16, seed: u32) -> Metadata {
    Metadata {
        mode,
        uid: seed * 70_001,
        gid: seed + 3,
        mtime: i64::from(seed) * 1_000_003 - 5,
        mtime_nsec: seed * 7 % 1_000_000_000,
        xattrs: Vec::new(),
    }
}

fn with_xattrs(mut metadata: Metadata, xattrs: &[(&str, &[u8])]) -> Metadata {
    metadata.xattrs = xattrs
        .iter()
        .map(|(n, v)| (n.as_bytes().to_vec(), v.to_vec()))
        .collect();
    metadata.xattrs.sort();
    metadata
}

/// Bytes that differ from block to block.
fn content(len: usize, seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed) * 0x9e37_79b9 + 1;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        bytes.push((state >> 33) as u8);
    }
    bytes
}

fn add(image: &mut Writer, metadata: &Metadata, data: &[u8], piece: usize) -> Inode {
    let mut file = image.begin(data.len() as u64);
    for part in data.chunks(piece) {
        file.data(part).unwrap();
    }
    file.end(metadata).unwrap()
}

fn new_image() -> (tempfile::NamedTempFile, Writer) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let writer = Writer::new(file.reopen().unwrap()).unwrap();
    (file, writer)
}

/// `fsck.erofs` finds nothing wrong, if it is here.
fn fsck(test: &str, image: &Path) {
    let Ok(output) = Command::new("fsck.erofs")
        .arg("--extract")
        .arg(image)
        .output()
    else {
        return skip(test, "there is no fsck.erofs");
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "fsck.erofs: {} {said}",
        output.status
    );
    assert!(!said.contains("<E>"), "fsck.erofs: {said}");
}

/// Everything that can be seen of a tree by one line each.
type Seen = BTreeMap<Vec<u8>, String>;

/// What our reader sees.
fn read(image: &Image) -> Seen {
    let mut seen = Seen::new();
    let mut left = vec![(Vec::new(), image.root())];
    while let Some((path, nid)) = left.pop() {
        let info = image.info(nid).unwrap();
        seen.insert(path.clone(), line_of(image, &info));
        if info.kind == Kind::Directory {
            for entry in image.entries(&info).unwrap() {
                left.push(([&path[..], b"/", &entry.name].concat(), entry.nid));
            }
        }
    }
    seen
}

fn line_of(image: &Image, info: &Info) -> String {
    let m = &info.metadata;
    let size = if info.kind == Kind::Directory {
        0
    } else {
        info.size_bytes
    };
    let what = match info.kind {
        Kind::File => {
            let mut data = vec![0; info.size_bytes as usize];
            image.read_at(info, 0, &mut data).unwrap();
            format!("{:x}", hash(&data))
        }
        Kind::Symlink => format!("{:?}", image.target(info).unwrap()),
        _ => format!("{:?}", info.device),
    };
    format!(
        "{:?} {:o} {} {} {}.{:09} links {} size {size} {what} {:?}",
        info.kind,
        m.mode,
        m.uid,
        m.gid,
        m.mtime,
        m.mtime_nsec,
        info.links,
        m.xattrs
            .iter()
            .map(|(n, v)| (String::from_utf8_lossy(n), hash(v)))
            .collect::<Vec<_>>()
    )
}

fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3)
    })
}

/// What the kernel sees below a mount point.
fn look(root: &Path) -> Seen {
    let mut seen = Seen::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let m = fs::symlink_metadata(&path).unwrap();
        let kind = m.file_type();
        let kind = match () {
            () if kind.is_dir() => Kind::Directory,
            () if kind.is_symlink() => Kind::Symlink,
            () if kind.is_char_device() => Kind::CharDevice,
            () if kind.is_block_device() => Kind::BlockDevice,
            () if kind.is_fifo() => Kind::Fifo,
            () if kind.is_socket() => Kind::Socket,
            () => Kind::File,
        };
        let what = match kind {
            Kind::File => format!("{:x}", hash(&fs::read(&path).unwrap())),
            Kind::Symlink => format!("{:?}", fs::read_link(&path).unwrap().as_os_str().as_bytes()),
            _ => format!("{:?}", (rustix_major(m.rdev()), rustix_minor(m.rdev()))),
        };
        let size = if kind == Kind::Directory { 0 } else { m.len() };
        let relative = path.as_os_str().as_bytes()[root.as_os_str().len()..].to_vec();
        seen.insert(
            relative,
            format!(
                "{kind:?} {:o} {} {} {}.{:09} links {} size {size} {what} {:?}",
                m.mode() & 0o7777,
                m.uid(),
                m.gid(),
                m.mtime(),
                m.mtime_nsec(),
                m.nlink(),
                xattrs(&path)
            ),
        );
        if kind == Kind::Directory {
            left.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
    }
    seen
}

fn rustix_major(rdev: u64) -> u32 {
    ((rdev >> 32 & 0xffff_f000) | (rdev >> 8 & 0xfff)) as u32
}

fn rustix_minor(rdev: u64) -> u32 {
    ((rdev >> 12 & 0xffff_ff00) | (rdev & 0xff)) as u32
}

/// Attributes as `getfattr` shows them.
fn xattrs(path: &Path) -> Vec<(String, u64)> {
    let output = Command::new("getfattr")
        .args([
            "--no-dereference",
            "--absolute-names",
            "-d",
            "-m",
            "-",
            "-e",
            "hex",
        ])
        .arg(path)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut found: Vec<_> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| {
            let hex = value.strip_prefix("0x").unwrap_or_default();
            let bytes: Vec<u8> = (0..hex.len() / 2)
                .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
                .collect();
            (name.to_owned(), hash(&bytes))
        })
        .collect();
    found.sort();
    found
}

/// Mounts the image where this is allowed, and gives what the kernel sees.
fn mounted(test: &str, image: &Path) -> Option<Seen> {
    if Command::new("getfattr").arg("--version").output().is_err() {
        skip(test, "there is no getfattr (package attr)");
        return None;
    }
    let at = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "erofs", "-o", "ro,loop"])
        .arg(image)
        .arg(at.path())
        .output()
        .unwrap();
    if !mounted.status.success() {
        let why = String::from_utf8_lossy(&mounted.stderr);
        skip(
            test,
            &format!("this kernel does not mount EROFS: {}", why.trim()),
        );
        return None;
    }
    let seen = look(at.path());
    let unmounted = Command::new("umount").arg(at.path()).status().unwrap();
    assert!(unmounted.success());
    Some(seen)
}

/// Compares what our reader sees with the kernel, and has `fsck.erofs` look.
fn judge(test: &str, image: &Path) -> Seen {
    fsck(test, image);
    let ours = read(&Image::open(File::open(image).unwrap()).unwrap());
    if let Some(kernel) = mounted(test, image) {
        assert_eq!(ours.len(), kernel.len());
        for ((path, ours), (kernels_path, kernel)) in ours.iter().zip(&kernel) {
            assert_eq!(path, kernels_path);
            assert_eq!(ours, kernel, "{}", String::from_utf8_lossy(path));
        }
    }
    ours
}

#[test]
fn every_type_of_file_is_read_back() {
    let (file, mut image) = new_image();
    let long_name = vec![b'n'; 255];
    let mut root = Directory {
        metadata: metadata(0o755, 1),
        entries: Vec::new(),
    };
    let mut put =
        |name: &[u8], inode: Inode| root.entries.push((name.to_vec(), Child::Inode(inode)));
    for (index, size) in [
        0, 1, 100, 2047, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 8192, 65_535, 65_536, 70_000,
        300_001,
    ]
    .into_iter()
    .enumerate()
    {
        let seed = index as u32 + 2;
        let inode = add(
            &mut image,
            &metadata(0o644, seed),
            &content(size, seed),
            777 + size / 3,
        );
        put(format!("file{size}").as_bytes(), inode);
    }
    let acl = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x04\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let m = with_xattrs(
        metadata(0o6755, 40),
        &[
            ("user.one", b"1"),
            ("user.empty", b""),
            ("trusted.t", &[0, 255]),
            ("security.capability", capability),
            ("system.posix_acl_access", acl),
        ],
    );
    put(b"attributes", add(&mut image, &m, b"short", 9));
    let m = with_xattrs(
        metadata(0o600, 41),
        &[
            ("user.big", &content(40_000, 5)),
            ("user.z", &content(9000, 6)),
        ],
    );
    put(
        b"large-attributes",
        add(&mut image, &m, &content(5000, 7), 5000),
    );
    let link = add(&mut image, &metadata(0o444, 42), b"linked", 10);
    put(b"link1", link);
    put(b"link2", link);
    put(&long_name, link);
    for (name, content) in [
        ("symlink", Content::Symlink(b"../elsewhere".to_vec())),
        ("symlink-long", Content::Symlink(vec![b'x'; 4095])),
        (
            "symlink-longer-than-inline",
            Content::Symlink(vec![b'x'; 4040]),
        ),
        ("null", Content::CharDevice(1, 3)),
        ("big-minor", Content::CharDevice(511, 70_000)),
        ("disk", Content::BlockDevice(259, 1)),
        ("fifo", Content::Fifo),
        ("socket", Content::Socket),
    ] {
        put(
            name.as_bytes(),
            image.special(&metadata(0o777, 50), &content).unwrap(),
        );
    }
    // Names on both sides of `.` and `..`, and of many bytes.
    for name in [
        &b"!"[..],
        b"-",
        b"...",
        b"\xff\xfe",
        "größe".as_bytes(),
        b"a b\nc",
        b"A",
        b"a",
    ] {
        put(name, add(&mut image, &metadata(0o1777, 60), name, 1));
    }
    root.entries.push((b"dir".to_vec(), Child::Directory(1)));
    root.entries.push((b"sticky".to_vec(), Child::Directory(2)));
    let inner = Directory {
        metadata: with_xattrs(metadata(0o700, 70), &[("user.d", b"d")]),
        entries: vec![
            (b"link3".to_vec(), Child::Inode(link)),
            (b"deep".to_vec(), Child::Directory(3)),
        ],
    };
    let sticky = Directory {
        metadata: metadata(0o3777, 71),
        entries: Vec::new(),
    };
    image
        .finish(&[root, inner, sticky, Directory::default()])
        .unwrap();

    let seen = judge("every_type_of_file_is_read_back", file.path());
    assert_eq!(seen.len(), 16 + 2 + 3 + 8 + 8 + 2 + 1 + 1 + 1);
    assert!(seen[&b"/dir/link3"[..]].contains("links 4 "));
    assert!(seen[&b""[..]].contains("Directory 755 70001 4 999998.000000007 links 4 "));
    assert!(seen[&b"/big-minor"[..]].contains("(511, 70000)"));
}

#[test]
fn a_large_sparse_file_takes_no_room() {
    let (file, mut image) = new_image();
    let size = 20 << 30;
    let mut sparse = image.begin(size);
    sparse.hole(5).unwrap();
    sparse.data(b"near the start").unwrap();
    sparse.hole((7 << 30) + 12_345).unwrap();
    sparse.data(&content(300_000, 3)).unwrap();
    sparse
        .hole(size - 5 - 14 - (7 << 30) - 12_345 - 300_000 - 3)
        .unwrap();
    sparse.data(b"end").unwrap();
    let sparse = sparse.end(&metadata(0o644, 1)).unwrap();
    let zeros = add(&mut image, &metadata(0o644, 2), &vec![0; 3_000_000], 65_000);
    let mut entries = vec![
        (b"sparse".to_vec(), Child::Inode(sparse)),
        (b"zeros".to_vec(), Child::Inode(zeros)),
    ];
    // Whatever size, a hole and some bytes.
    for size in [65_536, 65_537, 131_071, 131_072, 200_000] {
        for data_at in [0, 4096, 65_536, 70_000, 131_072, 199_990] {
            if data_at + 9 > size {
                continue;
            }
            let mut file = image.begin(size);
            file.hole(data_at).unwrap();
            file.data(b"some text").unwrap();
            file.hole(size - data_at - 9).unwrap();
            let inode = file.end(&metadata(0o600, 4)).unwrap();
            entries.push((
                format!("{size}-{data_at}").into_bytes(),
                Child::Inode(inode),
            ));
        }
    }
    let directory = Directory {
        metadata: metadata(0o755, 3),
        entries,
    };
    image.finish(&[directory]).unwrap();

    let stat = fs::metadata(file.path()).unwrap();
    assert!(
        stat.blocks() * 512 < 3 << 20,
        "{} bytes on the host",
        stat.blocks() * 512
    );
    let image = Image::open(File::open(file.path()).unwrap()).unwrap();
    let root = image.info(image.root()).unwrap();
    let entry = image
        .entries(&root)
        .unwrap()
        .into_iter()
        .find(|e| e.name == b"sparse")
        .unwrap();
    let info = image.info(entry.nid).unwrap();
    let at = |offset, len| {
        let mut bytes = vec![0; len];
        image.read_at(&info, offset, &mut bytes).unwrap();
        bytes
    };
    assert_eq!(info.size_bytes, size);
    assert_eq!(at(0, 22), b"\0\0\0\0\0near the start\0\0\0");
    assert_eq!(at((7 << 30) + 12_364, 300_000), content(300_000, 3));
    assert_eq!(at(size - 5, 5), b"\0\0end");
    let test = "a_large_sparse_file_takes_no_room";
    let mount = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "erofs", "-o", "ro,loop"])
        .arg(file.path())
        .arg(mount.path())
        .output()
        .unwrap();
    if !mounted.status.success() {
        return skip(test, "this kernel does not mount EROFS");
    }
    use std::os::unix::fs::FileExt;
    let seen = File::open(mount.path().join("sparse")).unwrap();
    let mut bytes = vec![1; 300_000];
    seen.read_exact_at(&mut bytes, (7 << 30) + 12_364).unwrap();
    let mut end = vec![1; 5];
    seen.read_exact_at(&mut end, size - 5).unwrap();
    let zeros = fs::read(mount.path().join("zeros")).unwrap();
    let small: Vec<_> = image
        .entries(&root)
        .unwrap()
        .into_iter()
        .filter(|e| e.name.contains(&b'-'))
        .collect();
    let same: Vec<bool> = small
        .iter()
        .map(|e| {
            let info = image.info(e.nid).unwrap();
            let mut ours = vec![0; info.size_bytes as usize];
            image.read_at(&info, 0, &mut ours).unwrap();
            let name = std::ffi::OsStr::from_bytes(&e.name);
            let kernel = fs::read(mount.path().join(name)).unwrap();
            let text = ours.windows(9).filter(|w| *w == b"some text").count();
            ours == kernel && text == 1
        })
        .collect();
    drop(seen);
    assert!(
        Command::new("umount")
            .arg(mount.path())
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(bytes, content(300_000, 3));
    assert_eq!(end, b"\0\0end");
    assert!(zeros.len() == 3_000_000 && zeros.iter().all(|b| *b == 0));
    assert!(same.len() == 18 && same.iter().all(|s| *s), "{same:?}");
}

#[test]
fn a_hundred_thousand_files_in_one_directory() {
    let (file, mut image) = new_image();
    let mut root = Directory {
        metadata: metadata(0o755, 1),
        entries: Vec::new(),
    };
    for number in 0..100_000u32 {
        let text = number.to_string();
        let inode = add(&mut image, &metadata(0o644, 2), text.as_bytes(), 10);
        root.entries.push((
            format!("file number {number}").into_bytes(),
            Child::Inode(inode),
        ));
    }
    image.finish(&[root]).unwrap();
    fsck("a_hundred_thousand_files_in_one_directory", file.path());
    let image = Image::open(File::open(file.path()).unwrap()).unwrap();
    let root = image.info(image.root()).unwrap();
    let entries = image.entries(&root).unwrap();
    assert_eq!(entries.len(), 100_000);
    assert!(entries.is_sorted_by_key(|e| e.name.clone()));
    let one = entries
        .iter()
        .find(|e| e.name == b"file number 77777")
        .unwrap();
    let info = image.info(one.nid).unwrap();
    let mut data = [0; 5];
    image.read_at(&info, 0, &mut data).unwrap();
    assert_eq!(&data, b"77777");
}

#[test]
fn what_cannot_be_is_refused() {
    let refuse = |entries: Vec<(Vec<u8>, Child)>, more: usize| {
        let (_file, image) = new_image();
        let mut all = vec![Directory {
            metadata: Metadata::default(),
            entries,
        }];
        all.resize(1 + more, Directory::default());
        image.finish(&all).unwrap_err()
    };
    let (_file, mut image) = new_image();
    let file = add(&mut image, &Metadata::default(), b"", 1);
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        assert!(matches!(
            refuse(vec![(name.to_vec(), Child::Inode(file))], 0),
            WriteError::Name(_)
        ));
    }
    assert!(matches!(
        refuse(vec![(b"d".to_vec(), Child::Directory(0))], 0),
        WriteError::Tree(0)
    ));
    assert!(matches!(refuse(Vec::new(), 1), WriteError::Tree(1)));
    assert!(matches!(
        refuse(
            vec![
                (b"d".to_vec(), Child::Directory(1)),
                (b"e".to_vec(), Child::Directory(1))
            ],
            1
        ),
        WriteError::Tree(1)
    ));
    assert!(matches!(
        refuse(
            vec![
                (b"d".to_vec(), Child::Directory(1)),
                (b"d".to_vec(), Child::Directory(2))
            ],
            2
        ),
        WriteError::Twice(_)
    ));
    let xattr = |name: &str, len| with_xattrs(Metadata::default(), &[(name, &vec![1; len])]);
    for bad in [
        xattr("system.other", 1),
        xattr("user.", 1),
        xattr("nothing", 1),
    ] {
        assert!(matches!(
            image.begin(0).end(&bad),
            Err(WriteError::XattrName(_))
        ));
    }
    assert!(matches!(
        image.begin(0).end(&xattr("user.a", 70_000)),
        Err(WriteError::Xattrs { .. })
    ));
    assert!(matches!(
        image.special(&Metadata::default(), &Content::Symlink(vec![])),
        Err(WriteError::Target(0))
    ));
    assert!(matches!(
        image.begin(5).end(&Metadata::default()),
        Err(WriteError::Size {
            announced: 5,
            given: 0
        })
    ));
    assert!(matches!(
        image.begin(1).data(b"ab"),
        Err(WriteError::Size { .. })
    ));
}

#[test]
fn damaged_images_give_errors_only() {
    let (file, mut image) = new_image();
    let inode = add(
        &mut image,
        &with_xattrs(metadata(0o644, 1), &[("user.a", b"b")]),
        &content(70_000, 1),
        5000,
    );
    let mut sparse = image.begin(200_000);
    sparse.hole(200_000).unwrap();
    let sparse = sparse.end(&metadata(0o644, 2)).unwrap();
    let link = image
        .special(&metadata(0o777, 3), &Content::Symlink(b"there".to_vec()))
        .unwrap();
    let entries = vec![
        (b"file".to_vec(), Child::Inode(inode)),
        (b"sparse".to_vec(), Child::Inode(sparse)),
        (b"link".to_vec(), Child::Inode(link)),
    ];
    image
        .finish(&[Directory {
            metadata: metadata(0o755, 4),
            entries,
        }])
        .unwrap();
    let good = fs::read(file.path()).unwrap();
    let mut errors = 0;
    // Every byte of superblock, root and the run of inodes, one after the other.
    let interesting = (1024..1300)
        .chain(17 * 4096 + 4096..17 * 4096 + 4096 + 700)
        .filter(|at| *at < good.len());
    for at in interesting {
        let mut bad = good.clone();
        bad[at] ^= 0xff;
        fs::write(file.path(), &bad).unwrap();
        let Ok(image) = Image::open(File::open(file.path()).unwrap()) else {
            errors += 1;
            continue;
        };
        let mut left = vec![image.root()];
        let mut steps = 0;
        while let Some(nid) = left.pop() {
            steps += 1;
            let Ok(info) = image.info(nid) else {
                errors += 1;
                continue;
            };
            let _ = image.target(&info);
            let mut some = vec![0; info.size_bytes.min(100_000) as usize];
            errors += usize::from(image.read_at(&info, 0, &mut some).is_err());
            if steps < 100 {
                left.extend(
                    image
                        .entries(&info)
                        .unwrap_or_default()
                        .iter()
                        .map(|e| e.nid),
                );
            }
        }
    }
    assert!(errors > 20, "{errors}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Files of any content in any pieces come back, `fsck.erofs` is content, and the same calls give the same bytes.
    #[test]
    fn any_files_come_back(
        files in proptest::collection::vec((0usize..200_000, 0usize..4, 1usize..70_000), 1..12),
        directories in 0usize..5,
    ) {
        let build = || {
            let (file, mut image) = new_image();
            let mut all = vec![Directory::default(); directories + 1];
            for index in 1..all.len() {
                let parent = index / 2;
                all[parent].entries.push((format!("d{index}").into_bytes(), Child::Directory(index)));
            }
            for (index, (size, zeros, piece)) in files.iter().enumerate() {
                let data = expected(index, *size, *zeros);
                let inode = add(&mut image, &metadata(0o640, index as u32), &data, *piece);
                let at = index % all.len();
                all[at].entries.push((format!("f{index}").into_bytes(), Child::Inode(inode)));
            }
            image.finish(&all).unwrap();
            file
        };
        let (one, two) = (build(), build());
        prop_assert_eq!(fs::read(one.path()).unwrap(), fs::read(two.path()).unwrap());
        fsck("any_files_come_back", one.path());
        let image = Image::open(File::open(one.path()).unwrap()).unwrap();
        let mut left = vec![image.root()];
        let mut found = 0;
        while let Some(nid) = left.pop() {
            let info = image.info(nid).unwrap();
            for entry in image.entries(&info).unwrap() {
                if entry.name[0] == b'd' {
                    left.push(entry.nid);
                    continue;
                }
                found += 1;
                let index: usize = std::str::from_utf8(&entry.name[1..]).unwrap().parse().unwrap();
                let (size, zeros, _) = files[index];
                let info = image.info(entry.nid).unwrap();
                let mut data = vec![1; info.size_bytes as usize];
                image.read_at(&info, 0, &mut data).unwrap();
                prop_assert!(data == expected(index, size, zeros), "file {}", index);
            }
        }
        prop_assert_eq!(found, files.len());
    }
}

/// Content with more or less zeros in it.
fn expected(index: usize, size: usize, zeros: usize) -> Vec<u8> {
    let mut data = content(size, index as u32);
    match zeros {
        1 => data.iter_mut().skip(1000).for_each(|b| *b = 0),
        2 => data.iter_mut().take(150_000).for_each(|b| *b = 0),
        3 => data.fill(0),
        _ => {}
    }
    data
}
