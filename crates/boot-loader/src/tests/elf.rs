use super::images::*;
use super::*;

#[test]
fn a_kernel_lies_where_it_says_with_zeroes_behind() {
    for placement in [Placement::Map, Placement::Copy] {
        let t = Try {
            placement,
            cmdline: "console=ttyS0 quiet",
            ..Default::default()
        };
        let kernel = vmlinux(&[]);
        let loaded = t.load(&kernel).unwrap();
        t.check(&loaded);
        assert_eq!((loaded.kind, &loaded.initrd), (KernelKind::Elf, &None));
        assert_eq!(loaded.kernel, 0x100_0000..0x100_b000);
        assert_eq!(t.bytes(0x100_0000, 0x2345), kernel[0x1000..0x3345]);
        assert_eq!(t.bytes(0x100_2345, 0xcbb), vec![0; 0xcbb]);
        assert_eq!(t.bytes(0x100_3000, 0x1001), kernel[0x4000..0x5001]);
        assert_eq!(t.bytes(0x100_4001, 0x6fff), vec![0; 0x6fff]);
        let EntryState::Long64 {
            rip,
            rsp,
            boot_params_addr,
            ..
        } = loaded.entry
        else {
            panic!("{loaded:?}");
        };
        assert_eq!((rip, rsp, boot_params_addr), (ENTRY, 0x9000, 0x7000));
    }
}

#[test]
fn the_zero_page_says_what_the_64_bit_entry_needs() {
    let t = Try {
        initrd: Some(&[5; 5000]),
        cmdline: "quiet",
        ..Default::default()
    };
    let loaded = t.load(&vmlinux(&[])).unwrap();
    let initrd = loaded.initrd.unwrap();
    let wanted = [
        (0x070, 8, RSDP),
        (0x0c0, 4, 0),
        (0x0c4, 4, 0),
        (0x1ef, 1, 0),
        (0x1fe, 2, 0xaa55),
        (0x202, 4, u64::from(u32::from_le_bytes(*b"HdrS"))),
        (0x206, 2, 0x20c),
        (0x210, 1, 0xff),
        (0x211, 1, 1),
        (0x218, 4, initrd.start),
        (0x21c, 4, 5000),
        (0x228, 4, 0x2_0000),
        (0x230, 4, 0x20_0000),
        (0x238, 4, 2047),
        (0x250, 8, 0),
    ];
    for (offset, len, want) in wanted {
        assert_eq!(t.number(0x7000 + offset, len), want, "offset {offset:#x}");
    }
    assert_eq!(
        t.e820(),
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (0x10_0000, 31 << 20, 1)
        ]
    );
}

#[test]
fn memory_above_the_hole_is_in_the_map() {
    let t = Try {
        ram: ram(3072 + 512),
        ..Default::default()
    };
    t.load(&vmlinux(&[])).unwrap();
    assert_eq!(
        t.e820()[2..],
        [(0x10_0000, 0xbff0_0000, 1), (4 << 30, 512 << 20, 1)]
    );
}

#[test]
fn page_tables_reach_a_kernel_in_every_gib() {
    for gib in [0u64, 1, 2] {
        let t = Try {
            ram: ram(3072),
            ..Default::default()
        };
        let base = (gib << 30) + (512 << 20);
        let kernel = elf(
            base + 8,
            &[load_at(0x1000, base, 0x1000, 2 << 20)],
            &[],
            0x2000,
        );
        let loaded = t.load(&kernel).unwrap();
        t.check(&loaded);
    }
}

#[test]
fn linux_is_entered_in_64_bit_mode_and_other_kernels_through_their_note() {
    let pvh = pvh_note(0x100_0040);
    let both = [linux_note(), pvh.clone()].concat();
    let short = note(b"Xen\0", 18, &0x100_0040u32.to_le_bytes());
    let is_pvh = |kernel: &[u8], entry| {
        let t = Try {
            entry,
            ..Default::default()
        };
        let loaded = t.load(kernel).unwrap();
        t.check(&loaded);
        match loaded.entry {
            EntryState::Protected32 {
                eip,
                start_info_addr,
                ..
            } => {
                assert_eq!((eip, start_info_addr), (0x100_0040, 0x6100));
                true
            }
            EntryState::Long64 { rip, .. } => {
                assert_eq!(rip, ENTRY);
                false
            }
        }
    };
    assert!(is_pvh(&vmlinux(&pvh), EntryPreference::Auto));
    assert!(is_pvh(&vmlinux(&short), EntryPreference::Auto));
    assert!(!is_pvh(&vmlinux(&both), EntryPreference::Auto));
    assert!(!is_pvh(&vmlinux(&linux_note()), EntryPreference::Auto));
    assert!(!is_pvh(&vmlinux(&pvh), EntryPreference::Linux64));
    assert!(is_pvh(&vmlinux(&both), EntryPreference::Pvh));
    let e = Try {
        entry: EntryPreference::Pvh,
        ..Default::default()
    }
    .refusal(&vmlinux(&[]));
    assert!(e.contains("has no PVH entry"), "{e}");
}

#[test]
fn the_start_info_says_what_pvh_needs() {
    let t = Try {
        initrd: Some(&[5; 5000]),
        entry: EntryPreference::Pvh,
        cmdline: "quiet",
        ..Default::default()
    };
    let loaded = t.load(&vmlinux(&pvh_note(0x100_0040))).unwrap();
    let initrd = loaded.initrd.unwrap();
    // Xen start_info.h: magic, version, flags, modules, their list, command line, rsdp, map, entries.
    let numbers: Vec<u64> = [
        (0, 4),
        (4, 4),
        (8, 4),
        (12, 4),
        (16, 8),
        (24, 8),
        (32, 8),
        (40, 8),
        (48, 4),
    ]
    .map(|(at, len)| t.number(0x6100 + at, len))
    .to_vec();
    assert_eq!(
        numbers,
        [0x336e_c578, 1, 0, 1, 0x6140, 0x2_0000, RSDP, 0x6180, 3]
    );
    assert_eq!(
        (t.number(0x6140, 8), t.number(0x6148, 8)),
        (initrd.start, 5000)
    );
    let map: Vec<_> = (0..3u64)
        .map(|i| 0x6180 + i * 24)
        .map(|at| (t.number(at, 8), t.number(at + 8, 8), t.number(at + 16, 4)))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (0x10_0000, 31 << 20, 1)
        ]
    );
}

#[test]
fn a_virtual_entry_is_translated() {
    let segment = load_at(0x1000, 0x100_0000, 0x1000, 0x1000);
    let mut kernel = elf(segment.vaddr + 0x10, &[segment], &[], 0x2000);
    kernel[16] = 3; // ET_DYN
    let loaded = Try::default().load(&kernel).unwrap();
    assert!(
        matches!(
            loaded.entry,
            EntryState::Long64 {
                rip: 0x100_0010,
                ..
            }
        ),
        "{loaded:?}"
    );
}

#[test]
fn what_is_wrong_with_an_elf_is_said() {
    let changed = |at: usize, value: &[u8]| {
        let mut kernel = vmlinux(&[]);
        kernel[at..at + value.len()].copy_from_slice(value);
        kernel
    };
    let segments = |all: &[Ph]| elf(ENTRY, all, &[], 0x3000);
    let first = load_at(0x1000, 0x100_0000, 0x1000, 0x1000);
    let cases = [
        (changed(4, &[1]), "a 32-bit ELF file"),
        (changed(5, &[2]), "a big-endian ELF file"),
        (changed(18, &[183]), "an ELF file for arm64"),
        (changed(18, &[99]), "for machine 99"),
        (changed(16, &[1]), "(ET_REL), such as a kernel module"),
        (changed(16, &[4]), "(ET_CORE)"),
        (changed(54, &[57]), "57 bytes long instead of 56"),
        (changed(56, &[0, 0]), "there are 0"),
        (changed(56, &[0xff, 0xff]), "there are 65535"),
        (changed(32, &[0xff; 8]), "is the file complete"),
        (
            changed(32, &0x5000u64.to_le_bytes()),
            "its ELF program headers would reach to 20592",
        ),
        (
            vmlinux(&[])[..63].to_vec(),
            "its ELF header would reach to 64",
        ),
        (
            vmlinux(&[])[..0x5000].to_vec(),
            "ends after 20480 bytes, but its ELF segment 1 would reach to 20481",
        ),
        (
            segments(&[load_at(u64::MAX, 0x100_0000, 2, 2)]),
            "its ELF segment 0 would reach",
        ),
        (
            segments(&[load_at(0x1000, 0xf_f000, 0x1000, 0x1000)]),
            "outside 0x100000-0xc0000000",
        ),
        (
            segments(&[load_at(0x1000, 0xbfff_f000, 0x1000, 0x1001)]),
            "lie at 0xbffff000-0xc0000001",
        ),
        (
            segments(&[load_at(0x1000, 0x100_0000, 0x1000, u64::MAX)]),
            "-0x10000000000ffffff, outside",
        ),
        (
            segments(&[load_at(0x1000, 0x100_0000, 0x1000, 0xfff)]),
            "0x1000 bytes in the file but 0xfff",
        ),
        (
            segments(&[load_at(0x1000, 0x100_0000, 0x1000, 32 << 20)]),
            "give the guest at least 48 MiB",
        ),
        (
            segments(&[load_at(0x1000, 0x100_0fff, 1, 1), first]),
            "segments 1 and 0 overlap at 0x1000fff",
        ),
        (
            segments(&[Ph { kind: 2, ..first }]),
            "none of them is a segment to load",
        ),
        (
            segments(&[load_at(0x1000, 0x100_0000, 0x123, 0x1000)]),
            "ELF entry point 0x1000123",
        ),
        (vmlinux(&pvh_note(0x100_2345)), "PVH entry point 0x1002345"),
        (
            vmlinux(&pvh_note(0x1_0100_0000)),
            "PVH entry point 0x101000000",
        ),
    ];
    for (kernel, want) in cases {
        let e = Try::default().refusal(&kernel);
        assert!(
            e.starts_with("cannot load kernel \"/x/vmlinuz\": it"),
            "{e}"
        );
        assert!(e.contains(want), "{want} is not in: {e}");
    }
}

#[test]
fn damaged_notes_are_passed_over() {
    let huge = [0xff; 24].to_vec();
    let empty = note(b"", 0, b"");
    let odd = note(b"Xen\0", 18, b"\x01\x02\x03");
    for notes in [huge, empty, odd, vec![1; 11], pvh_note(1)[..19].to_vec()] {
        let loaded = Try::default().load(&vmlinux(&notes)).unwrap();
        assert!(
            matches!(loaded.entry, EntryState::Long64 { .. }),
            "{loaded:?}"
        );
    }
}
