// How large figures are in the room that they have.

// The width that a figure has in a box.
export const roomIn = (box) => Math.max(280, Math.min(820, box.clientWidth - 4 || 640));

// The size of a cell of a heat map with these names beside and above it.
export const cellSize = (down, across, room) =>
  Math.max(14, Math.min(52, (room - 130) / across.length, Math.max(28, 900 / down.length)));
