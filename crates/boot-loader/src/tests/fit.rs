//! Initrd, command line, and files that are no kernels.

use super::images::*;
use super::*;

#[test]
fn the_initrd_lies_as_high_as_the_kernel_takes_it() {
    let content = pattern(5000);
    let cases = [
        (32, vmlinux(&[]), 0x1ff_e000),
        (3072, vmlinux(&[]), 0x7fff_e000),
    ];
    let mut limited = bzimage(7);
    limited[0x22c..0x230].copy_from_slice(&0x37ff_ffffu32.to_le_bytes());
    for (mib, kernel, want) in cases.into_iter().chain([(1024, limited, 0x37ff_e000)]) {
        for placement in [Placement::Map, Placement::Copy] {
            let t = Try {
                ram: ram(mib),
                initrd: Some(&content),
                placement,
                ..Default::default()
            };
            let loaded = t.load(&kernel).unwrap();
            t.check(&loaded);
            assert_eq!(loaded.initrd, Some(want..want + 5000));
            assert_eq!(t.bytes(want, 5000), content);
        }
    }
}

#[test]
fn an_initrd_that_does_not_fit_is_refused_with_the_figures() {
    // The kernel ends at 16 MiB and 44 KiB, the guest at 17 MiB.
    let room = (17 << 20) - 0x100_b000;
    let content = vec![1; room + 1];
    let small = |initrd| Try {
        ram: ram(17),
        initrd: Some(initrd),
        ..Default::default()
    };
    let loaded = small(&content[..room]).load(&vmlinux(&[])).unwrap();
    assert_eq!(loaded.initrd, Some(0x100_b000..0x110_0000));
    assert_eq!(
        small(&content).refusal(&vmlinux(&[])),
        "initrd \"/x/initrd\" of 981 KiB does not fit in 17 MiB of guest memory beside the kernel of \
         44 KiB; give the guest at least 18 MiB"
    );
    let mut low = bzimage(7);
    low[0x22c..0x230].copy_from_slice(&0x17f_ffffu32.to_le_bytes());
    let e = small(&content).refusal(&low);
    assert!(e.contains("needs guest memory up to 24 MiB"), "{e}");
    let e = Try {
        initrd: Some(&content),
        ..Default::default()
    }
    .refusal(&low);
    assert!(
        e.contains("between the end of the kernel at 0x1800000 and 0x1800000"),
        "{e}"
    );
    let e = small(&[]).refusal(&vmlinux(&[]));
    assert!(e.contains("initrd \"/x/initrd\": it is empty"), "{e}");
}

#[test]
fn directories_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = File::open(dir.path()).unwrap();
    let kernel = file(&vmlinux(&[]));
    let path = Path::new("/x");
    let source = BootSource {
        kernel: &dir,
        kernel_path: path,
        initrd: None,
        cmdline: "",
        entry: EntryPreference::Auto,
    };
    let refusal = |source| {
        load(&ram(32), source, None, Placement::Map)
            .unwrap_err()
            .to_string()
    };
    assert!(refusal(&source).contains("\"/x\": it is a directory"));
    let source = BootSource {
        kernel: &kernel,
        initrd: Some((&dir, path)),
        ..source
    };
    assert!(refusal(&source).contains("is a directory"));
}

#[test]
fn the_command_line_is_passed_whole_or_not_at_all() {
    let long = "x".repeat(2048);
    let mut short = bzimage(7);
    short[0x238..0x23c].copy_from_slice(&255u32.to_le_bytes());
    let mut boundless = bzimage(7);
    boundless[0x238..0x23c].copy_from_slice(&[0xff; 4]);
    let huge = "x".repeat(65_536);
    for (kernel, cmdline, want) in [
        (vmlinux(&[]), &long[..2047], Ok(())),
        (
            vmlinux(&[]),
            &long[..],
            Err("it has 2048 characters, this kernel takes at most 2047"),
        ),
        (short.clone(), &long[..255], Ok(())),
        (
            short,
            &long[..256],
            Err("it has 256 characters, this kernel takes at most 255"),
        ),
        (boundless.clone(), &huge[..65_535], Ok(())),
        (boundless, &huge[..], Err("at most 65535")),
        (
            vmlinux(&[]),
            "a\0b",
            Err("byte 0x00 at position 1 is not printable ASCII"),
        ),
        (vmlinux(&[]), "quiet\n", Err("byte 0x0a at position 5")),
        (vmlinux(&[]), "é", Err("byte 0xc3 at position 0")),
    ] {
        let t = Try {
            cmdline,
            ..Default::default()
        };
        match (t.load(&kernel), want) {
            (Ok(loaded), Ok(())) => t.check(&loaded),
            (Err(e), Err(want)) => assert!(e.to_string().contains(want), "{e}"),
            (got, _) => panic!("{got:?}"),
        }
    }
}

#[test]
fn what_is_no_kernel_is_named() {
    let mut arm = b"MZ".to_vec();
    arm.resize(0x38, 0);
    arm.extend(b"ARM\x64");
    let cases: [(&[u8], &str); 10] = [
        (
            b"\x1f\x8b\x08\x00",
            "it starts with 1f 8b 08 00 (a gzip file); give an ELF vmlinux or a bzImage, uncompressed",
        ),
        (b"\xfd7zXZ\0", "(an xz file)"),
        (b"\x28\xb5\x2f\xfd", "(a zstd file)"),
        (b"#!/bin/sh\n", "(a script)"),
        (b"hello\n", "(a text file)"),
        (
            b"MZ\x90\0",
            "(a Windows or EFI program without a Linux setup header)",
        ),
        (
            &arm,
            "(an arm64 kernel Image); give an ELF vmlinux or a bzImage, for x86-64",
        ),
        (b"070701", "(a cpio archive, as initrds are)"),
        (b"\0", "it starts with 00 (no format known here)"),
        (b"", "it is empty"),
    ];
    for (bytes, want) in cases {
        let e = Try::default().refusal(bytes);
        assert!(e.contains(want), "{want} is not in: {e}");
    }
}

#[test]
fn memory_without_a_low_megabyte_is_refused() {
    let e = Try {
        ram: ram(1),
        ..Default::default()
    }
    .refusal(&vmlinux(&[]));
    assert!(e.contains("give the guest at least 2 MiB"), "{e}");
}

#[test]
fn a_refusal_leaves_memory_alone() {
    let t = Try {
        cmdline: "quiet",
        initrd: Some(&[]),
        ..Default::default()
    };
    t.refusal(&vmlinux(&[]));
    assert_eq!(t.bytes(0, 32 << 20), vec![0; 32 << 20]);
}
