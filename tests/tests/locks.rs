//! Locks on disk images, with real machines and real QEMU: who keeps whom off an image, and that they are never lost in a move.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::godwit::{Ended, Node, refused_start};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::image_locks::{Watch, held, holds};
use godwit_tests::process::Process;
use godwit_tests::wait;
use godwit_tests::workload::Workload;

const LIMIT: Duration = Duration::from_secs(60);

/// Of the locks on an image, the byte that only Godwit takes.
const GODWIT: i64 = 300;

const WORKLOAD: Workload = Workload::SMALL;

fn main() {
    let kvm = &[Need::Kvm];
    let qemu = &[Need::Kvm, Need::Qemu];
    harness::main(vec![
        harness::test("qemu_holds_the_same_bytes", qemu, qemu_holds_the_same_bytes),
        harness::test("qemu_refuses_what_a_machine_runs", qemu, qemu_refuses_what_a_machine_runs),
        harness::test("qemu_img_refuses_what_a_machine_runs", &[Need::Kvm, Need::QemuImg], qemu_img_refuses),
        harness::test("what_qemu_runs_is_refused", qemu, what_qemu_runs_is_refused),
        harness::test("a_second_machine_on_an_image_is_refused", kvm, a_second_machine_is_refused),
        harness::test("readers_share_an_image", qemu, readers_share_an_image),
        harness::test("locks_follow_a_move", kvm, locks_follow_a_move),
        harness::test("locks_stay_after_a_failed_move", kvm, locks_stay_after_a_failed_move),
    ])
}

/// An image of a MiB.
struct Image<'a> {
    scene: &'a Scene,
    path: PathBuf,
}

impl<'a> Image<'a> {
    fn new(scene: &'a Scene) -> Result<Self> {
        let path = scene.path().join("root.img");
        fs::write(&path, vec![0x5a; 1 << 20])?;
        Ok(Self { scene, path })
    }

    fn disk(&self, more: &str) -> String {
        format!("id=root,path={}{more}", self.path.display())
    }

    fn sender(&self, name: &str, disk: &str) -> Result<Node> {
        Node::sender(self.scene, name, None, &WORKLOAD, &["--disk", disk, "--ownership", "none"])
    }

    fn receiver(&self, name: &str) -> Result<Node> {
        let folder = self.scene.path().to_str().context("the scene's path is no text")?;
        Node::receiver(self.scene, name, None, "tcp://127.0.0.1:0", &["--disk-dir", folder])
    }

    /// How a machine with this disk fails to start, having written nothing.
    fn refused_start(&self, name: &str, disk: &str, more: &[&str]) -> Result<Ended> {
        let before = (fs::read(&self.path)?, fs::metadata(&self.path)?.modified()?);
        let ended = refused_start(self.scene, name, &WORKLOAD, &[&["--disk", disk], more].concat())?;
        ensure!(before == (fs::read(&self.path)?, fs::metadata(&self.path)?.modified()?), "the image was written to");
        ended.ensure_says(&["disk root", &self.path.display().to_string()])
    }

    /// QEMU with the image as a guest's disk.
    fn qemu(&self, name: &str, more: &str) -> Result<Process> {
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-accel",
            "tcg",
            "-machine",
            "microvm",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-S",
        ]);
        command.args(["-device", "virtio-blk-device,drive=root", "-drive"]);
        command.arg(format!("if=none,id=root,format=raw,file={}{more}", self.path.display()));
        Process::start(name, self.scene.path(), command, None)
    }

    fn held(&self) -> Result<Vec<i64>> {
        held(&self.path)
    }

    /// Waits until these bytes are held, and no others.
    fn wait_for(&self, bytes: &[i64]) -> Result<()> {
        wait::until_true(&format!("the bytes {bytes:?} are held"), LIMIT, || Ok(self.held()? == bytes))
            .with_context(|| format!("{:?}", self.held()))
    }

    fn is_held_by(&self, node: &Node) -> Result<bool> {
        holds(node.process.pid(), &self.path)
    }
}

fn quit(mut node: Node) -> Result<()> {
    node.command(&["quit"], &[], LIMIT)?.ensure_code(0)?;
    node.process.wait(LIMIT).map(drop)
}

fn qemu_holds_the_same_bytes(scene: &Scene) -> Result<()> {
    let image = Image::new(scene)?;
    for (godwit, qemu, bytes) in [("", "", &[100, 101, 201][..]), (",readonly", ",readonly=on", &[100, 201])] {
        let mut process = image.qemu("qemu", qemu)?;
        image.wait_for(bytes)?;
        process.kill()?;
        let node = image.sender("machine", &image.disk(godwit))?;
        ensure!(image.held()? == [bytes, &[GODWIT]].concat(), "{:?}", image.held());
        quit(node)?;
        ensure!(image.held()?.is_empty());
    }
    Ok(())
}

fn qemu_refuses_what_a_machine_runs(scene: &Scene) -> Result<()> {
    let image = Image::new(scene)?;
    let node = image.sender("machine", &image.disk(""))?;
    for (name, more) in [("writer", ""), ("reader", ",readonly=on")] {
        let mut qemu = image.qemu(name, more)?;
        ensure!(!qemu.wait(LIMIT)?.success(), "QEMU runs with the image of a running machine");
        ensure!(qemu.stderr().contains("lock"), "{}", qemu.describe());
    }
    node.ensure_guest_unharmed(&WORKLOAD)?;
    quit(node)?;
    let _qemu = image.qemu("after", "")?;
    image.wait_for(&[100, 101, 201])
}

fn qemu_img_refuses(scene: &Scene) -> Result<()> {
    let image = Image::new(scene)?;
    let qcow2 = Image { scene, path: scene.path().join("qcow2.img") };
    let output = |name: &str| scene.path().join(name).display().to_string();
    let qemu_img = |arguments: &[&str]| -> Result<Output> { Ok(Command::new("qemu-img").args(arguments).output()?) };
    let raw = image.path.display().to_string();
    // What qemu-img takes for a format of its own it wants to lock also for `info`; of a raw image it asks for no lock there.
    let other = qcow2.path.display().to_string();
    ensure!(qemu_img(&["create", "-q", "-f", "qcow2", &other, "1M"])?.status.success());
    fs::File::options().write(true).open(&qcow2.path)?.set_len(1 << 20)?;
    let commands: [&[&str]; 4] = [
        &["info", &other],
        &["check", &other],
        &["convert", "-f", "raw", "-O", "raw", &raw, &output("copy.img")],
        &["resize", "-f", "raw", &raw, "1M"],
    ];
    let (first, second) = (image.disk(""), format!("id=other,path={other}"));
    let more = ["--disk", &first, "--disk", &second, "--ownership", "none"];
    let node = Node::sender(scene, "machine", None, &WORKLOAD, &more)?;
    for command in commands {
        let refused = qemu_img(command)?;
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(
            !refused.status.success() && text.contains("Failed to get") && text.contains("lock"),
            "{command:?}: {text}"
        );
    }
    ensure!(qemu_img(&["info", "-U", &other])?.status.success(), "who asks to be let in all the same is");
    quit(node)?;
    for command in commands {
        let done = qemu_img(command)?;
        ensure!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
    Ok(())
}

fn what_qemu_runs_is_refused(scene: &Scene) -> Result<()> {
    let image = Image::new(scene)?;
    let mut qemu = image.qemu("qemu", "")?;
    image.wait_for(&[100, 101, 201])?;
    for (name, more) in [("writer", ""), ("reader", ",readonly")] {
        image.refused_start(name, &image.disk(more), &["--ownership", "none"])?.ensure_says(&[
            "is in use",
            "another program",
            "for writing",
            "byte 101",
            "end whatever uses it",
        ])?;
    }
    image.refused_start("cached", &image.disk(""), &["--ownership", "none", "--unsafe-cache"])?;
    // The claim that came before the locks is free again.
    image.refused_start("claimed", &image.disk(""), &[])?;
    qemu.kill()?;
    let claims = scene.path().join("root.img.godwit");
    let node = Node::sender(
        scene,
        "machine",
        None,
        &WORKLOAD,
        &["--disk", &image.disk(""), "--ownership", claims.to_str().context("no text")?],
    )?;
    quit(node)
}

fn a_second_machine_is_refused(scene: &Scene) -> Result<()> {
    let image = Image::new(scene)?;
    let first = image.sender("machine", &image.disk(""))?;
    for (name, more) in [("writer", ""), ("reader", ",readonly")] {
        image
            .refused_start(name, &image.disk(more), &["--ownership", "none"])?
            .ensure_says(&["another Godwit machine has it open for writing"])?;
    }
    first.ensure_guest_unharmed(&WORKLOAD)?;
    // A killed process leaves no locks behind.
    let mut first = first;
    first.process.kill()?;
    quit(image.sender("next", &image.disk(""))?)
}

fn readers_share_an_image(scene: &Scene) -> Result<()> {
    let image = Image::new(scene)?;
    let read_only = image.disk(",readonly");
    let first = image.sender("first", &read_only)?;
    let second = image.sender("second", &read_only)?;
    let mut qemu = image.qemu("qemu", ",readonly=on")?;
    wait::until_true("QEMU has it, too", LIMIT, || holds(qemu.pid(), &image.path))?;
    image
        .refused_start("writer", &image.disk(""), &["--ownership", "none"])?
        .ensure_says(&["lets nobody write to it"])?;
    // The others are not in the way of a move either.
    let third = image.receiver("third")?;
    first.move_to(&third.uri()?, &[], LIMIT)?.ensure_moved(&third, &WORKLOAD)?;
    ensure!(qemu.is_running()?);
    quit(third)?;
    quit(second)
}

fn locks_follow_a_move(scene: &Scene) -> Result<()> {
    let image = Image::new(scene)?;
    let mut first = image.sender("first", &image.disk(""))?;
    let second = image.receiver("second")?;
    let watch = Watch::start(&image.path)?;
    let mut command = first.start_move(&second.uri()?, &["--test-hold-at", "pause"])?;
    first.wait_for_phase("pause", LIMIT)?;
    ensure!(image.is_held_by(&first)? && image.is_held_by(&second)?, "both hold it before the guest is paused");
    image.refused_start("in-between", &image.disk(""), &["--ownership", "none"])?;
    first.command(&["release"], &[], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_moved(&second, &WORKLOAD)?;
    first.process.wait(LIMIT)?;
    image.refused_start("after", &image.disk(""), &["--ownership", "none"])?;

    // Onward, and the process that has sent it is killed at once.
    let third = image.receiver("third")?;
    second.move_to(&third.uri()?, &[], LIMIT)?.ensure_moved(&third, &WORKLOAD)?;
    let mut second = second;
    second.process.kill()?;
    ensure!(image.is_held_by(&third)?);
    let seen = watch.end()?;
    eprintln!("{seen:?}");
    ensure!(seen.free == 0 && seen.looks > 1000, "{seen:?}");
    quit(third)?;
    ensure!(image.held()?.is_empty(), "{:?}", image.held());
    Ok(())
}

fn locks_stay_after_a_failed_move(scene: &Scene) -> Result<()> {
    let image = Image::new(scene)?;
    let source = image.sender("source", &image.disk(""))?;
    let watch = Watch::start(&image.path)?;
    let held_at = |receiver: &Node, phase: &str| -> Result<Process> {
        let command = source.start_move(&receiver.uri()?, &["--test-hold-at", phase])?;
        // What is told until then is the end of the move before.
        wait::until_true("the move begins", LIMIT, || Ok(source.migration()?["active"] == true))?;
        source.wait_for_phase(phase, LIMIT)?;
        Ok(command)
    };
    for (name, phase) in [("early", "first-pass"), ("late", "state")] {
        let mut lost = image.receiver(name)?;
        let mut command = held_at(&lost, phase)?;
        lost.process.kill()?;
        let _ = source.command(&["release"], &[], LIMIT)?;
        Ended::wait(&mut command, LIMIT)?.ensure_code(4)?;
        ensure!(image.is_held_by(&source)?);
    }
    // A receiver that has not let go yet is not in the way of the next one.
    let frozen = image.receiver("frozen")?;
    let mut command = held_at(&frozen, "state")?;
    frozen.process.signal(nix::sys::signal::Signal::SIGSTOP)?;
    source.command(&["cancel"], &[], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_code(5)?;
    ensure!(image.is_held_by(&frozen)?);
    let next = image.receiver("next")?;
    source.move_to(&next.uri()?, &[], LIMIT)?.ensure_moved(&next, &WORKLOAD)?;
    ensure!(image.is_held_by(&next)?);
    // Once it goes on it finds that nothing has come of the move.
    frozen.process.signal(nix::sys::signal::Signal::SIGCONT)?;
    wait::until_true("the frozen one lets go", LIMIT, || Ok(!image.is_held_by(&frozen)?))?;
    let seen = watch.end()?;
    ensure!(seen.free == 0 && seen.looks > 1000, "{seen:?}");
    quit(next)
}
