// The two views, and the key, which stays in this tab.

import { getKey, setKey } from "./api.js";
import { show } from "./board.js";
import { listModels, start } from "./chat.js";

const $ = (id) => document.getElementById(id);

function turn() {
  const board = location.hash === "#board";
  $("chat").hidden = board;
  $("board").hidden = !board;
  for (const [id, here] of [["to-chat", !board], ["to-board", board]]) {
    if (here) $(id).setAttribute("aria-current", "page");
    else $(id).removeAttribute("aria-current");
  }
  show(board);
}

$("key").value = getKey();
$("login").addEventListener("submit", (event) => event.preventDefault());
$("key").addEventListener("change", () => {
  setKey($("key").value);
  listModels();
});
addEventListener("hashchange", turn);
turn();
start();
