//! Stacks of layers against a plain model of what they mean, and hostile ones.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "each test program uses some of it")]
mod support;

use std::collections::BTreeMap;
use std::io::{Cursor, Write};

use alveole_image::{Digest, ImageError, Layer, Limits, Quiet, make_root_disk};
use proptest::prelude::*;
use support::{E, Tree, device, dir, disk_tree, file, layer, link, symlink};
use tar::EntryType;

fn make(layers: &[Vec<u8>], limits: &Limits) -> Result<tempfile::NamedTempFile, ImageError> {
    let layers: Vec<Layer<'_>> = layers
        .iter()
        .enumerate()
        .map(|(index, bytes)| Layer {
            name: format!("number {index}"),
            diff_id: None,
            size_bytes: bytes.len() as u64,
            open: Box::new(|| Ok(Box::new(Cursor::new(&bytes[..])))),
            kept: None,
        })
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    make_root_disk(&layers, file.reopen().unwrap(), limits, &Quiet)?;
    Ok(file)
}

fn tree(layers: &[&[E]]) -> Tree {
    let layers: Vec<Vec<u8>> = layers.iter().map(|entries| layer(entries)).collect();
    disk_tree(make(&layers, &Limits::default()).unwrap().path())
}

fn error(layers: &[Vec<u8>]) -> String {
    make(layers, &Limits::default()).unwrap_err().to_string()
}

/// The paths, each with its content's size or what else it is.
fn paths(tree: &Tree) -> Vec<String> {
    tree.iter()
        .map(|(path, line)| {
            let kind = line.split(' ').next().unwrap();
            let to = line
                .split(" to ")
                .nth(1)
                .map_or("", |t| t.trim_end_matches(" []"));
            format!("{} {kind}{to}", String::from_utf8_lossy(path))
        })
        .skip(1)
        .collect()
}

#[test]
fn whiteouts_and_opaque_directories_hide_lower_layers_only() {
    let lower = [
        dir("a"),
        file("a/1", "1"),
        file("a/2", "2"),
        dir("b"),
        file("b/1", "1"),
        dir("b/c"),
        file("b/c/1", ""),
        dir("d"),
        file("d/1", ""),
        file("e", ""),
    ];
    let upper = [
        file("a/.wh.1", ""),
        file("a/3", "3"),
        // Both orders: what the layer has itself stays.
        file("b/new", ""),
        file("b/.wh..wh..opq", ""),
        dir("b/c"),
        file("b/c/2", ""),
        file(".wh.d", ""),
        dir("d"),
        file("d/2", ""),
        file("e", "new"),
        file(".wh.e", ""),
        file(".wh.nothing", ""),
        file(".wh..wh.plnk", ""),
        file("nowhere/.wh.x", ""),
    ];
    assert_eq!(
        paths(&tree(&[&lower, &upper])),
        [
            "/a Directory",
            "/a/2 File",
            "/a/3 File",
            "/b Directory",
            "/b/c Directory",
            "/b/c/2 File",
            "/b/new File",
            "/d Directory",
            "/d/2 File",
            "/e File"
        ]
    );
}

#[test]
fn hard_links_into_lower_layers() {
    let lower = [file("a", "the old a"), file("c", "c")];
    let middle = [
        link("b", "a"),
        file("a", "the new a, longer"),
        link("same", "/./x/../c"),
    ];
    let upper = [file(".wh.c", "")];
    let found = tree(&[&lower, &middle, &upper]);
    assert_eq!(paths(&found), ["/a File", "/b File", "/same File"]);
    assert!(found[&b"/a"[..]].contains("links 1 17 bytes"), "{found:?}");
    // Its content was passed over at first: a newer file of that name hid it.
    assert!(found[&b"/b"[..]].contains("links 1 9 bytes"), "{found:?}");
    assert!(
        found[&b"/same"[..]].contains("links 1 1 bytes"),
        "{found:?}"
    );
}

#[test]
fn parents_that_are_links_are_followed_within_the_root() {
    let lower = [
        dir("usr"),
        dir("usr/lib"),
        file("usr/lib/old", ""),
        symlink("lib", "usr/lib"),
        symlink("out", "/../../../etc/./deep"),
        symlink("up", "../../up2"),
        symlink("loop", "loop"),
    ];
    let upper = [
        file("lib/new", ""),
        file("lib/.wh.old", ""),
        file("out/passwd", ""),
        file("up/x", ""),
    ];
    assert_eq!(
        paths(&tree(&[&lower, &upper])),
        [
            "/etc Directory",
            "/etc/deep Directory",
            "/etc/deep/passwd File",
            "/lib Symlink\"usr/lib\"",
            "/loop Symlink\"loop\"",
            "/out Symlink\"/../../../etc/./deep\"",
            "/up Symlink\"../../up2\"",
            "/up2 Directory",
            "/up2/x File",
            "/usr Directory",
            "/usr/lib Directory",
            "/usr/lib/new File"
        ]
    );
    let why = error(&[layer(&lower), layer(&[file("loop/x", "")])]);
    assert!(
        why.contains("loop/x: its path follows too many symbolic links"),
        "{why}"
    );
    // A directory of that name takes the link's place.
    assert_eq!(
        paths(&tree(&[
            &[symlink("l", "d"), file("d/x", "")],
            &[dir("l"), file("l/y", "")]
        ])),
        ["/d Directory", "/d/x File", "/l Directory", "/l/y File"]
    );
}

#[test]
fn paths_do_not_lead_out() {
    let found = tree(&[&[
        file("../../etc/a", ""),
        file("/abs/b", ""),
        file("./c/../../d", ""),
        dir("/"),
        link("e", "../../etc/a"),
        symlink("s", "../../../etc/shadow"),
    ]]);
    assert_eq!(
        paths(&found),
        [
            "/abs Directory",
            "/abs/b File",
            "/d File",
            "/e File",
            "/etc Directory",
            "/etc/a File",
            "/s Symlink\"../../../etc/shadow\""
        ]
    );
    assert!(
        found[&b""[..]].starts_with("Directory 755 1003:2003 "),
        "{found:?}"
    );
}

#[test]
fn names_that_only_look_the_same_are_different() {
    let found = tree(&[&[
        file("a", ""),
        file("A", ""),
        file("\u{e9}", ""),
        file("e\u{301}", ""),
        file("a ", ""),
        file("b\nc", ""),
    ]]);
    assert_eq!(found.len(), 7);
}

#[test]
fn impossible_layers_are_refused_with_a_reason() {
    for (entries, why) in [
        (
            vec![link("a", "nothing")],
            "a: it is a hard link to nothing, which is not there",
        ),
        (
            vec![link("a", "a")],
            "a: it is a hard link to a, which is not there",
        ),
        (
            vec![dir("d"), link("a", "d")],
            "it is a hard link to the directory d",
        ),
        (
            vec![link("a", "../../../etc/passwd")],
            "hard link to etc/passwd, which is not there",
        ),
        (
            vec![file("f", ""), file("f/x", "")],
            "f/x: it lies below f, which is no directory",
        ),
        (
            vec![file(&"n".repeat(256), "")],
            "a name has 256 bytes, 255 are the most",
        ),
        (
            vec![file(&"p/".repeat(1100), "")],
            "a path has 1100 parts, 1024 are the most",
        ),
        (
            vec![file(&"long/".repeat(1000), "")],
            "a path has more than 4096 bytes",
        ),
        (vec![file(".wh.", "")], "whiteout of nothing"),
        (vec![file(".wh...", "")], "whiteout of nothing"),
        (
            vec![symlink("s", "")],
            "symbolic link to a target of 0 bytes",
        ),
        (
            vec![E {
                kind: EntryType::new(b'Z'),
                ..file("z", "")
            }],
            "z is of a type that is not known: 'Z'",
        ),
    ] {
        let found = error(&[layer(&entries)]);
        assert!(
            found.contains(why) && found.contains("layer number 0 is refused"),
            "{found}"
        );
    }
    let good = layer(&[file("a", vec![7; 100_000])]);
    for cut in [100, 600, 50_000] {
        assert!(error(&[good[..cut].to_vec()]).contains("cut off in the middle"));
    }
    let mut changed = good;
    changed[10] ^= 1;
    assert!(error(&[changed]).contains("the checksum of a header is wrong"));
    assert!(
        error(&[b"<html>this is what a proxy said</html>".repeat(40)]).contains("no tar archive")
    );
}

#[test]
fn sizes_beyond_all_measure() {
    // The largest size of GNU's binary numbers, of a file and of a long name.
    for kind in [
        EntryType::Regular,
        EntryType::GNULongName,
        EntryType::XHeader,
        EntryType::GNUSparse,
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.as_mut_bytes()[..1].copy_from_slice(b"f");
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(u64::MAX);
        header.set_cksum();
        let why = error(&[[header.as_bytes().to_vec(), vec![1; 2048]].concat()]);
        assert!(
            why.contains("cut off")
                || why.contains("are the most")
                || why.contains("map of a sparse file")
                || why.contains("numeric field"),
            "{kind:?}: {why}"
        );
    }
}

#[test]
fn limits_name_themselves_and_the_cure() {
    let few = Limits {
        entries: 5,
        disk_bytes: 1 << 20,
        ratio: 100,
        devices: 2,
    };
    let refused = |entries: &[E]| make(&[layer(entries)], &few).unwrap_err().to_string();
    let many: Vec<E> = (0..6).map(|n| file(&n.to_string(), "")).collect();
    assert!(refused(&many).contains(
        "more than 5 entries are not taken; for an image that you trust, --max-entries raises that"
    ));
    let devices: Vec<E> = (0..3).map(|n| device(&n.to_string(), 1, n)).collect();
    assert!(refused(&devices).contains("--max-devices raises that"));
    assert!(refused(&[file("big", vec![1; 2 << 20])]).contains("--max-size raises that"));
    // A few bytes that become directories, link by link.
    let deep = [symlink("l", &"d/".repeat(1000)), file("l/x", "")];
    assert!(refused(&deep).contains("too many directories"));
}

#[test]
fn a_hundred_thousand_files_and_half_of_them_gone() {
    let lower: Vec<E> = (0..100_000)
        .map(|n| file(&format!("d{}/f{n}", n % 100), n.to_string()))
        .collect();
    let upper: Vec<E> = (0..50).map(|n| file(&format!(".wh.d{n}"), "")).collect();
    let found = tree(&[&lower, &upper]);
    assert_eq!(found.len(), 1 + 50 + 50_000);
    assert!(found.contains_key(&b"/d99/f99999"[..]) && !found.contains_key(&b"/d49/f99949"[..]));
}

#[test]
fn packed_layers_and_bombs() {
    let plain = layer(&[file("a", b"some text".repeat(10_000))]);
    let gzip = |bytes: &[u8]| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    };
    let zstd = |bytes: &[u8]| {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    };
    let expected = disk_tree(
        make(std::slice::from_ref(&plain), &Limits::default())
            .unwrap()
            .path(),
    );
    let (front, back) = plain.split_at(777);
    for packed in [
        gzip(&plain),
        zstd(&plain),
        [gzip(front), gzip(back)].concat(),
        [zstd(front), zstd(back)].concat(),
    ] {
        let disk = make(std::slice::from_ref(&packed), &Limits::default()).unwrap();
        assert_eq!(disk_tree(disk.path()), expected);
        let why = error(&[packed[..packed.len() / 2].to_vec()]);
        assert!(why.contains("cut off") || why.contains("damaged"), "{why}");
        let mut changed = packed;
        let middle = changed.len() / 2;
        changed[middle] ^= 0x55;
        changed[middle + 1] ^= 0x55;
        assert!(error(&[changed]).contains("layer number 0 is refused"));
    }
    // Layer over layer of zeros: from 256 MiB on the ratio counts.
    let zeros = gzip(&layer(&[file("zeros", vec![0; 300 << 20])]));
    let strict = Limits {
        ratio: 100,
        ..Limits::default()
    };
    let why = make(std::slice::from_ref(&zeros), &strict)
        .unwrap_err()
        .to_string();
    assert!(
        why.contains("more than 100 times its size") && why.contains("--max-ratio"),
        "{why}"
    );
    // Zeros as such are welcome, and take no room.
    let disk = make(&[zeros], &Limits::default()).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert!(disk.as_file().metadata().unwrap().blocks() < 512);
}

#[test]
fn what_layers_unpack_to_is_checked() {
    let bytes = layer(&[file("a", "")]);
    let with = |diff_id| Layer {
        name: "l".into(),
        diff_id: Some(diff_id),
        size_bytes: 0,
        open: Box::new(|| Ok(Box::new(Cursor::new(&bytes[..])))),
        kept: None,
    };
    let make = |layer| {
        make_root_disk(
            &[layer],
            tempfile::tempfile().unwrap(),
            &Limits::default(),
            &Quiet,
        )
    };
    assert_eq!(
        make(with(Digest::of(&bytes))).unwrap(),
        [Digest::of(&bytes)]
    );
    assert!(matches!(
        make(with(Digest::of(b"other"))),
        Err(ImageError::Digest { .. })
    ));
}

#[test]
fn sparse_files_of_gnu_tar() {
    let test = "sparse_files_of_gnu_tar";
    if !support::have(test, &["tar"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sparse");
    let sparse = std::fs::File::create(&path).unwrap();
    use std::os::unix::fs::FileExt;
    sparse.set_len(20 << 30).unwrap();
    // Enough stretches for headers of their own.
    for part in 0..40u64 {
        sparse
            .write_all_at(
                format!("part {part}").as_bytes(),
                part * (400 << 20) + part * 3,
            )
            .unwrap();
    }
    for options in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let archive = folder.path().join("archive.tar");
        support::run(
            std::process::Command::new("tar")
                .args(options)
                .args(["--sparse", "-C"])
                .arg(folder.path())
                .arg("-cf")
                .arg(&archive)
                .arg("sparse"),
        );
        let bytes = std::fs::read(&archive).unwrap();
        assert!(bytes.len() < 1 << 20);
        let disk = make(&[bytes], &Limits::default()).unwrap();
        let image = alveole_erofs::Image::open(disk.reopen().unwrap()).unwrap();
        let root = image.info(image.root()).unwrap();
        let entries = image.entries(&root).unwrap();
        assert_eq!(entries[0].name, b"sparse", "{options:?}");
        let info = image.info(entries[0].nid).unwrap();
        assert_eq!(info.size_bytes, 20 << 30, "{options:?}");
        for part in 0..40u64 {
            let expected = format!("\0part {part}\0");
            let mut found = vec![1; expected.len()];
            let at = part * (400 << 20) + part * 3;
            // The first has nothing before it.
            let (at, skip) = if at == 0 { (0, 1) } else { (at - 1, 0) };
            image.read_at(&info, at, &mut found[skip..]).unwrap();
            assert_eq!(&found[skip..], &expected.as_bytes()[skip..], "{options:?}");
        }
        use std::os::unix::fs::MetadataExt;
        let taken = disk.as_file().metadata().unwrap().blocks() * 512;
        assert!(taken < 4 << 20, "{options:?}: {taken}");
    }
}

// The model ----------------------------------------------------------------------------------------

/// What a path is, in a plain map of whole paths; directories are `None`.
type Model = BTreeMap<String, Option<Vec<u8>>>;

fn below(path: &str, root: &str) -> bool {
    path.strip_prefix(root)
        .is_some_and(|rest| rest.starts_with('/'))
}

/// Lays `upper`, which has no links, over `lower`: overlay semantics.
fn lay(lower: &Model, upper: &[Act]) -> Model {
    let mut model = lower.clone();
    for act in upper {
        match act {
            Act::Opaque(path) => model.retain(|p, _| !below(p, path)),
            Act::Whiteout(path) => model.retain(|p, _| p != path && !below(p, path)),
            _ => {}
        }
    }
    for act in upper {
        let (path, what) = match act {
            Act::Dir(path) => (path, None),
            Act::File(path, data) => (path, Some(data.clone())),
            _ => continue,
        };
        for (at, _) in path.match_indices('/') {
            model.insert(path[..at].into(), None);
        }
        if what.is_some() {
            model.retain(|p, _| !below(p, path));
        }
        model.insert(path.clone(), what);
    }
    model
}

#[derive(Debug, Clone)]
enum Act {
    Dir(String),
    File(String, Vec<u8>),
    Whiteout(String),
    Opaque(String),
}

fn act() -> impl Strategy<Value = Act> {
    let path = proptest::collection::vec("[abc]", 1..4).prop_map(|p| p.join("/"));
    (path, 0..10u8, 0..200_000usize).prop_map(|(path, kind, size)| match kind {
        0..3 => Act::Dir(path),
        3..7 => Act::File(path, vec![size as u8 | 1; size]),
        7..9 => Act::Whiteout(path),
        _ => Act::Opaque(path),
    })
}

/// Acts that fit together in one layer: nothing below a file of the same layer, and no path twice as different things.
fn consistent(acts: Vec<Act>) -> Vec<Act> {
    let mut kept: Vec<Act> = Vec::new();
    let path = |act: &Act| match act {
        Act::Dir(p) | Act::File(p, _) => Some((p.clone(), matches!(act, Act::File(..)))),
        _ => None,
    };
    for act in acts {
        let clashes = path(&act).is_some_and(|(p, is_file)| {
            kept.iter()
                .filter_map(path)
                .any(|(q, q_file)| q == p || below(&p, &q) && q_file || below(&q, &p) && is_file)
        });
        if !clashes {
            kept.push(act);
        }
    }
    kept
}

/// A path as an entry of a layer, with all its directories before it, as tools write them.
fn entries(acts: &[Act], parents: bool) -> Vec<E> {
    let mut all = Vec::new();
    for act in acts {
        let (path, entry) = match act {
            Act::Dir(path) => (path, dir(path)),
            Act::File(path, data) => (path, file(path, data.clone())),
            Act::Whiteout(path) => {
                let (parent, name) = path
                    .rsplit_once('/')
                    .map_or((String::new(), path.as_str()), |(p, n)| {
                        (format!("{p}/"), n)
                    });
                all.push(file(&format!("{parent}.wh.{name}"), ""));
                continue;
            }
            Act::Opaque(path) => {
                all.push(file(&format!("{path}/.wh..wh..opq"), ""));
                continue;
            }
        };
        if parents {
            all.extend(path.match_indices('/').map(|(at, _)| dir(&path[..at])));
        }
        all.push(entry);
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Random stacks mean what the model says, whether tools wrote parents or not, and the same stack gives the same bytes.
    #[test]
    fn stacks_mean_what_overlays_mean(stack in proptest::collection::vec(proptest::collection::vec(act(), 0..12), 1..5), parents: bool) {
        let stack: Vec<Vec<Act>> = stack.into_iter().map(consistent).collect();
        // A file of a lower layer in the way of an implicit parent is an error, not a meaning.
        let mut model = Model::new();
        for acts in &stack {
            let blocked = acts.iter().any(|act| match act {
                Act::Dir(path) | Act::File(path, _) => path.match_indices('/').any(|(at, _)| matches!(model.get(&path[..at]), Some(Some(_)))),
                _ => false,
            });
            prop_assume!(parents || !blocked);
            model = lay(&model, acts);
        }
        let layers: Vec<Vec<u8>> = stack.iter().map(|acts| layer(&entries(acts, parents))).collect();
        let disk = make(&layers, &Limits::default()).unwrap();
        let again = make(&layers, &Limits::default()).unwrap();
        prop_assert!(std::fs::read(disk.path()).unwrap() == std::fs::read(again.path()).unwrap());
        let found: Vec<(String, bool, String)> = disk_tree(disk.path()).into_iter().skip(1).map(|(path, line)| {
            let size = line.split(" bytes").next().unwrap().rsplit(' ').next().unwrap().to_owned();
            let is_file = line.starts_with("File");
            (String::from_utf8(path[1..].to_vec()).unwrap(), is_file, if is_file { size } else { String::new() })
        }).collect();
        let expected: Vec<(String, bool, String)> = model.into_iter().map(|(path, what)| {
            let size = what.as_ref().map_or(String::new(), |data| data.len().to_string());
            (path, what.is_some(), size)
        }).collect();
        let mut found = found;
        found.sort();
        prop_assert_eq!(found, expected);
    }

    /// Any bytes, in the middle of good ones, come to an end.
    #[test]
    fn damaged_layers_are_errors(at in 0usize..4000, bytes in proptest::collection::vec(any::<u8>(), 1..40)) {
        let mut bad = layer(&[dir("d"), E { xattrs: vec![("user.a".into(), b"1\n2".to_vec())], ..file("d/f", "text") }, link("l", "d/f"), file(&"long/".repeat(30), "")]);
        for (place, byte) in bad[at..].iter_mut().zip(bytes) {
            *place = byte;
        }
        let _ = make(&[bad.clone()], &Limits::default());
        alveole_image::fuzz_layer(&bad);
    }
}
