//! A PVH ELF that is not ours runs and moves: its memory is equal on both sides.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::wait;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);
const MEMORY_BYTES: u64 = 64 << 20;

fn main() {
    harness::main(vec![harness::test("any_pvh_elf_moves", &[Need::Kvm, Need::Assembler], any_pvh_elf_moves)])
}

/// Adds to one word of each page from 2 to 18 MiB, for ever.
const KERNEL: &str = r#"
    .section .note.pvh, "a", @note
    .long 4, 4, 18          # name size, value size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start

    .text
    .code32
    .globl start
start:
    xor %ebx, %ebx
next_pass:
    mov $0x200000, %edi
next_page:
    add $1, %ebx
    add %ebx, (%edi)
    add $0x1000, %edi
    cmp $0x1200000, %edi
    jb next_page
    jmp next_pass
"#;

/// A page that the kernel writes.
const WRITTEN_PAGE: u64 = 9 << 20;

fn any_pvh_elf_moves(scene: &Scene) -> Result<()> {
    let kernel = assemble(scene.path())?;
    let kernel = kernel.to_str().context("path")?;
    let source = Node::sender_with(scene, "source", &["--memory", "64M", "--kernel", kernel])?;
    let destination = Node::receiver(scene, "destination", None, "tcp://127.0.0.1:0", &["--hold"])?;
    ensure_page_changes(&source)?;

    // Held at commit the source is stopped for good, and its memory is what must arrive.
    let mut command = source.start_move(&destination.uri()?, &["--test-hold-at", "commit"])?;
    source.wait_for_phase("commit", LIMIT)?;
    let sent = save(&source, scene, "sent")?;
    source.command(&["release"], &[], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_audited()?;
    let arrived = save(&destination, scene, "arrived")?;
    let differing = sent.chunks(4096).zip(arrived.chunks(4096)).position(|(sent, arrived)| sent != arrived);
    ensure!(differing.is_none() && sent.len() == arrived.len(), "page {differing:?} differs");
    ensure!(sent.iter().any(|&byte| byte != 0));

    destination.command(&["resume"], &[], LIMIT)?.ensure_code(0)?;
    ensure_page_changes(&destination)
}

fn ensure_page_changes(node: &Node) -> Result<()> {
    let memory = node.memory()?;
    let first = memory.page(WRITTEN_PAGE)?;
    wait::until_true("the guest writes", LIMIT, || Ok(memory.page(WRITTEN_PAGE)? != first))
}

/// All of the machine's memory, as `pmemsave` gives it.
fn save(node: &Node, scene: &Scene, name: &str) -> Result<Vec<u8>> {
    let path = scene.path().join(name);
    node.execute("pmemsave", json!({ "val": 0, "size": MEMORY_BYTES, "filename": path }))?;
    let bytes = fs::read(path)?;
    ensure!(bytes.len() as u64 == MEMORY_BYTES, "pmemsave wrote {} bytes", bytes.len());
    Ok(bytes)
}

fn assemble(directory: &Path) -> Result<PathBuf> {
    let [source, object, kernel] = ["kernel.s", "kernel.o", "kernel.elf"].map(|name| directory.join(name));
    fs::write(&source, KERNEL)?;
    run(Command::new("as").args(["--64", "-o"]).args([&object, &source]))?;
    run(Command::new("ld").args(["-static", "-Ttext=0x100000", "-e", "start", "-o"]).args([&kernel, &object]))?;
    Ok(kernel)
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    ensure!(output.status.success(), "{:?}: {}", command.get_program(), String::from_utf8_lossy(&output.stderr));
    Ok(())
}
