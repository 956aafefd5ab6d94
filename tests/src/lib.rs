//! What Godwit's end-to-end tests and measurements are made of.
//!
//! Everything here looks at Godwit from outside: it starts the built binaries, talks to their control sockets, reads
//! guest memory with `process_vm_readv`, and counts bytes at network interfaces. Whatever it creates (processes,
//! namespaces, files) it removes when dropped.
//!
//! | module | what |
//! |---|---|
//! | [`process`], [`godwit`] | processes with logs; the sender and the receiver |
//! | [`netns`] | network namespaces joined by links that can be slowed, cut and counted |
//! | [`fuse`] | shared storage that is slow, unreachable or uncertain on demand |
//! | [`heartbeat`], [`sampler`] | the gap that a guest's own heartbeat shows |
//! | [`counters`] | what crossed an interface, and how well a cap was kept |
//! | [`workload`], [`qemu`] | the workload guest, here and in QEMU |
//! | [`measure`] | a whole move measured |
//! | [`versus`] | moves by Godwit and by QEMU in turn |
//! | [`convergence`] | moves predicted before they begin, and how right that was |
//! | [`footprint`] | how much memory a process takes, and how much of it is its guest's |
//! | [`guest_memory`] | guest memory read and altered from outside |
//! | [`image_locks`] | the locks on a disk image, as another program sees them |
//! | [`lab`] | hosts with stock kernels, in virtual machines |
//! | [`harness`] | tests that say at run time why they cannot run here |
//! | [`scenario`] | what the lab shows of a machine that moves: its clients, and how they are judged |
//! | [`chaos`] | faults at random moments of real moves, and who runs then |
//! | [`clock`], [`priority`] | the time, and threads that wake up on it |
//! | [`interrupt`] | a run that is asked to end |
//! | [`wait`] | waiting for a condition, never longer than a limit |

pub mod chaos;
pub mod clock;
pub mod cloud_hypervisor;
pub mod convergence;
pub mod counters;
pub mod footprint;
pub mod fuse;
pub mod godwit;
pub mod guest_memory;
pub mod harness;
pub mod heartbeat;
pub mod image_locks;
pub mod interrupt;
pub mod lab;
pub mod measure;
pub mod netns;
pub mod priority;
pub mod process;
pub mod qemu;
pub mod sampler;
pub mod scenario;
pub mod versus;
pub mod wait;
pub mod workload;
